"""What a run prints at its end: what it reached, where that is, and what to do next."""

import shlex
from collections.abc import Mapping

from gqe_jax.config import RunConfig


def describe_end(
    config: RunConfig, step: int, losses: Mapping[int, float], bits_per_byte: float | None
) -> str:
    """The lines for the terminal.

    Args:
      config: the run.
      step: the last step that was done.
      losses: the held-out loss by the step it was measured at.
      bits_per_byte: of the last of them; None if there is none.
    """
    reached = [f"{step * config.batch_size * config.sequence_length:,} tokens"]
    if losses:
        last, best = max(losses), min(losses, key=lambda at: (losses[at], -at))
        found = f"held-out loss {losses[last]:.4f}, {bits_per_byte:.4f} bits per byte"
        reached.append(found + f" at step {last}" * (last != step))
        if best != last:
            reached.append(f"lowest {losses[best]:.4f} at step {best}")
    run = shlex.quote(config.run_dir)
    return (
        f"reached step {step} of {config.steps}: {'; '.join(reached)}\n"
        f"in {config.run_dir}: checkpoints/{step}, metrics.jsonl, tensorboard/\n"
        f"next: python eval.py {run} | python generate.py {run} --prompt TEXT | "
        f"python -m gqe_jax.report {run}"
    )
