// Colours a text by the expert that each token selected in the chosen layer, group and rank.
"use strict";

const texts = JSON.parse(document.getElementById("texts").textContent);

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

function colour(expert, experts) {
  return experts <= 8 ? `var(--e${expert})` : `hsl(${(360 * expert) / experts} 75% 50%)`;
}

function visible(text) {
  return text === "" ? "·" : text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function start() {
  const select = (name) => document.getElementById(name);
  const value = (name) => Number(select(name).value);
  const address = new URLSearchParams(location.hash.slice(1)); // #run=0&layer=2&group=1&rank=0
  const box = document.getElementById("text");
  for (const text of texts) {
    text.index = new Uint16Array(bytes(text.index).buffer);
    text.percent = bytes(text.percent);
  }

  // Arrays are [layer, token, group, rank].
  function at(text, layer, token, group, rank) {
    const [, tokens, groups, k] = text.shape;
    return ((layer * tokens + token) * groups + group) * k + rank;
  }

  function fill(name, count) {
    const wanted = select(name).value || address.get(name) || 0;
    select(name).replaceChildren(
      ...Array.from({ length: count }, (_, i) => new Option(String(i), String(i))),
    );
    select(name).value = wanted < count ? String(wanted) : "0";
    select(`${name}-label`).hidden = count === 1 && name === "rank";
  }

  function showRun() {
    const text = texts[value("run")];
    const [layers, , groups, k] = text.shape;
    fill("layer", layers);
    fill("group", groups);
    fill("rank", k);
    box.replaceChildren(
      ...text.tokens.map((token, i) => {
        // A line break is shown, and breaks the line.
        const span = element("span", "", token === "" ? "·" : token.replace(/\n/g, "↵\n"));
        span.dataset.token = i;
        return span;
      }),
    );
    showRouting();
  }

  function showRouting() {
    const text = texts[value("run")];
    const [layer, group, rank] = ["layer", "group", "rank"].map(value);
    const experts = text.shape[4];
    const place = ["run", "layer", "group", "rank"].map((name) => `${name}=${value(name)}`);
    history.replaceState(null, "", `#${place.join("&")}`);
    Array.from(box.children).forEach((span, token) => {
      const expert = text.index[at(text, layer, token, group, rank)];
      span.dataset.expert = expert;
      span.style.setProperty("--c", colour(expert, experts));
    });
    document.getElementById("experts").replaceChildren(
      ...text.preferring[layer][group].map((tokens, expert) => {
        const card = element("div", "expert", "");
        card.style.setProperty("--c", colour(expert, experts));
        const load = (100 * text.load[layer][group][expert]).toFixed(1);
        const chips = element("div", "chips", "");
        for (const [token, share, count] of tokens) {
          const chip = element("span", "chip", "");
          chip.append(element("code", "", visible(token)), `${Math.round(100 * share)}% of ${count}`);
          chips.append(chip);
        }
        card.append(
          element("b", "", `expert ${expert}`),
          element("span", "load", `${load}% of tokens; preferred by`),
          chips,
        );
        return card;
      }),
    );
  }

  function showToken(event) {
    const span = event.target.closest("[data-token]");
    if (!span) return;
    const text = texts[value("run")];
    const [, , groups, k] = text.shape;
    const token = Number(span.dataset.token);
    const layer = value("layer");
    const parts = Array.from({ length: groups }, (_, group) => {
      const chosen = Array.from({ length: k }, (_, rank) => {
        const i = at(text, layer, token, group, rank);
        return `expert ${text.index[i]} (${text.percent[i]}%)`;
      });
      return `group ${group}: ${chosen.join(", ")}`;
    });
    const line = document.getElementById("token");
    line.replaceChildren(
      element("code", "", visible(text.tokens[token])),
      ` token ${token}, layer ${layer} · ${parts.join(" · ")}`,
    );
  }

  select("run-label").hidden = texts.length === 1;
  select("run").addEventListener("change", showRun);
  for (const name of ["layer", "group", "rank"]) {
    select(name).addEventListener("change", showRouting);
  }
  box.addEventListener("mouseover", showToken);
  if (address.get("run") in texts) select("run").value = address.get("run");
  showRun();
}

if (texts.length > 0) start();
