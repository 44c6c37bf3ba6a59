"""A tokenizer's own chat template: conversations as text, and which of it are the answers.

A template is a Jinja program in `tokenizer_config.json` or `chat_template.jinja` beside
tokenizer.json. It is rendered as `transformers` does, in Jinja's immutable sandbox.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from gqe_jax.data.special_tokens import read_fields
from gqe_jax.errors import DataError
from gqe_jax.storage import Location

_BEGIN, _END = "\ue000", "\ue001"  # private characters around what a template says it generates
Message = dict[str, Any]
Span = tuple[int, int]


class ChatTemplate:
    """The chat template of the tokenizer in a directory.

    Raises:
      DataError: there is none, it is no Jinja template, or Jinja is not installed.
    """

    def __init__(self, directory: Location):
        try:
            import jinja2
            import jinja2.ext
            import jinja2.nodes
            import jinja2.sandbox
        except ImportError:
            raise DataError(
                "chat templates need Jinja, which is not installed: pip install -e '.[chat]'"
            ) from None

        class Generation(jinja2.ext.Extension):
            """`{% generation %}`: marks what the model is to write."""

            tags = {"generation"}  # noqa: RUF012 - Jinja's

            def parse(self, parser):
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                call = self.call_method("_mark")
                return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

            def _mark(self, caller):
                return _BEGIN + caller() + _END

        self._names = read_fields(directory / "tokenizer_config.json")
        self._directory = directory
        self._errors = jinja2.TemplateError, TypeError, ValueError, LookupError
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = environment.globals
        functions["raise_exception"] = _raise_exception
        functions["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(self._source())
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template in {directory} is damaged ({error})") from None

    def _source(self) -> str:
        path = self._directory / "chat_template.jinja"
        source: Any = path.read_text(encoding="utf-8") if path.is_file() else None
        if source is None:
            source = self._names.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {each.get("name"): each.get("template") for each in source}
            source = named.get("default")
        if not isinstance(source, str):
            raise DataError(
                f"{self._directory} has no chat template; put chat_template.jinja, or a "
                "tokenizer_config.json with chat_template, beside tokenizer.json"
            )
        return source

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        special = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in self._names.items()
            if name.endswith("_token")
        }
        try:
            return self._template.render(
                **special,
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
        except self._errors as error:
            raise DataError(f"the chat template refuses the conversation ({error})") from None

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans of its characters that are answers.

        They are what the template marks as `{% generation %}`. Where it marks nothing, they are
        what each message of the assistant adds to the text before it and its generation prompt.

        Raises:
          DataError: the template refuses the conversation, or changes earlier text for later.
        """
        marked = self._render(messages)
        text = marked.replace(_BEGIN, "").replace(_END, "")
        if _BEGIN in marked:
            pieces = [piece.partition(_END) for piece in marked.split(_BEGIN)]
            spans, at = [], len(pieces[0][0]) + len(pieces[0][2])
            for answer, _, rest in pieces[1:]:
                spans.append((at, at + len(answer)))
                at += len(answer) + len(rest)
            return text, spans
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], prompt=True) if i else ""
            through = self._render(messages[: i + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(
                    "the chat template changes earlier messages for later ones, so that answers "
                    "cannot be told from its text; mark them in it with {% generation %}"
                )
            spans.append((len(before), len(through)))
        return text, spans


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise ValueError(message)
