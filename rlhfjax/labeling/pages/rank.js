// Ranks K responses: by radio buttons in their cards, by dragging their letters, or by keys.

import { choices, el, letter } from "./dom.js";

export function rank(item, before, changed, settings) {
  const count = item.responses.length;
  const cards = item.responses.map((text, i) => card(text, i));
  const tiles = cards.map((_, i) => tile(i));
  const lanes = [];
  for (let i = 0; i <= count; i++) lanes.push(lane(i));
  const board = el(
    "div",
    { class: "board", role: "group", "aria-label": "Ranks; drag the letters" },
    ...lanes.slice(1).map(({ node }) => node),
    lanes[0].node,
  );

  function card(text, i) {
    const name = `Response ${letter(i)}`;
    const ranks = Array.from({ length: count }, (_, r) => {
      return [String(r + 1), String(r + 1), `${name}: rank ${r + 1}`];
    });
    const ratings = Array.from({ length: settings.highest_rating }, (_, r) => {
      return [String(r + 1), String(r + 1), `${name}: quality ${r + 1}`];
    });
    const rank = choices(`rank-${i}`, `${name}: rank, 1 is the best`, ranks, place);
    const quality = `${name}: overall quality, ${settings.highest_rating} is the best`;
    const rating = choices(`rating-${i}`, quality, ratings, changed);
    const count_ = el("span", { class: "muted" });
    const flags = Object.entries(settings.flags).map(([value, text]) => {
      const input = el("input", { type: "checkbox", value, onchange: countFlags });
      return [input, el("label", { class: "check" }, input, el("span", { text }))];
    });

    function countFlags() {
      const checked = flags.filter(([input]) => input.checked).length;
      count_.textContent = checked ? ` ${checked}` : "";
      changed();
    }

    const node = el(
      "article",
      { class: "card response", "aria-label": name },
      el(
        "div",
        { class: "head" },
        el("b", { class: "letter", text: letter(i) }),
        el("span", { class: "muted", text: "Rank" }),
        rank.node,
      ),
      el("div", { class: "text", dir: "auto", text }),
      el("div", { class: "head" }, el("span", { class: "muted", text: "Quality" }), rating.node),
      el(
        "details",
        {},
        el("summary", {}, "Flags", count_),
        el("div", { class: "flags" }, ...flags.map(([, wrapped]) => wrapped)),
      ),
    );
    const setFlags = (names) => {
      for (const [input] of flags) input.checked = names.includes(input.value);
      countFlags();
    };
    const getFlags = () => flags.filter(([input]) => input.checked).map(([x]) => x.value);
    node.addEventListener("keydown", (event) => {
      const free = !event.target.matches("input[type=checkbox]");
      const isRating = event.target.name === `rating-${i}`;
      if (free && !isRating && rankByKey(event, i)) rank.focus();
    });
    return { node, rank, rating, setFlags, getFlags };
  }

  // Sets a rank by a digit. Returns whether the key was one.
  function rankByKey(event, i) {
    const digit = Number(event.key);
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === " ") return false;
    if (!(digit >= 1 && digit <= count)) return false;
    event.preventDefault();
    event.stopPropagation();
    setRank(i, digit);
    return true;
  }

  function setRank(i, value) {
    cards[i].rank.set(value);
    place();
  }

  // ------------------------------------------------------------ the board

  function lane(i) {
    const titles = { 0: "Not ranked", 1: "1 · best" };
    const title = titles[i] ?? String(i);
    const home = el("div", { class: "home" });
    const node = el("div", { class: "lane", "data-rank": i }, el("span", { text: title }), home);
    return { node, home };
  }

  function tile(i) {
    const node = el("button", { type: "button", class: "tile letter", text: letter(i) });
    node.addEventListener("pointerdown", (event) => drag(event, i));
    node.addEventListener("keydown", (event) => {
      if (rankByKey(event, i)) return node.focus();
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const now = Number(cards[i].rank.get() ?? (step > 0 ? 0 : count + 1));
      setRank(i, Math.min(count, Math.max(1, now + step)));
      node.focus();
    });
    return node;
  }

  function drag(event, i) {
    const node = tiles[i];
    if (event.button) return;
    event.preventDefault();
    node.focus();
    node.setPointerCapture(event.pointerId);
    const from = [event.clientX, event.clientY];
    node.classList.add("dragged");
    const under = (e) => {
      node.style.pointerEvents = "none";
      const found = document.elementFromPoint(e.clientX, e.clientY)?.closest(".lane");
      node.style.pointerEvents = "";
      return lanes.find((one) => one.node === found);
    };
    const move = (e) => {
      const [x, y] = [e.clientX - from[0], e.clientY - from[1]];
      node.style.transform = `translate(${x}px, ${y}px)`;
      for (const one of lanes) one.node.classList.toggle("target", one === under(e));
    };
    const drop = (e) => {
      const target = e.type === "pointerup" ? under(e) : undefined;
      node.classList.remove("dragged");
      node.style.transform = "";
      for (const one of lanes) one.node.classList.remove("target");
      node.removeEventListener("pointermove", move);
      node.removeEventListener("pointerup", drop);
      node.removeEventListener("pointercancel", drop);
      if (target) setRank(i, lanes.indexOf(target) || null);
      node.focus();
    };
    node.addEventListener("pointermove", move);
    node.addEventListener("pointerup", drop);
    node.addEventListener("pointercancel", drop);
  }

  // Puts every letter into the lane of its rank.
  function place() {
    tiles.forEach((node, i) => {
      const rank = cards[i].rank.get();
      const home = lanes[Number(rank ?? 0)].home;
      if (node.parentNode !== home) home.append(node);
      const at = rank ? `rank ${rank}` : "not ranked";
      node.setAttribute("aria-label", `Response ${letter(i)}, ${at}; arrow keys move it`);
    });
    lanes[0].node.hidden = cards.every((one) => one.rank.get());
    changed();
  }

  function given() {
    return {
      ranks: cards.map((one) => Number(one.rank.get()) || null),
      ratings: cards.map((one) => Number(one.rating.get()) || null),
      flags: cards.map((one) => one.getFlags()),
    };
  }

  cards.forEach((one, i) => {
    if (before?.ranks?.[i]) one.rank.set(before.ranks[i]);
    if (before?.ratings?.[i]) one.rating.set(before.ratings[i]);
    if (before?.flags?.[i]) one.setFlags(before.flags[i]);
  });
  place();
  return {
    title: "Rank the responses",
    lead: "1 is the best. Responses that are equally good get the same rank.",
    node: el("div", { class: "stack" }, board, el("div", { class: "pair" }, ...cards.map((c) => c.node))),
    keys: { [`1 – ${count}`]: ["Rank of the response in focus", null] },
    focus: () => cards[0].rank.focus(),
    draft: given,
    value: () => {
      const missing = cards.findIndex((one) => !one.rank.get());
      if (missing < 0) return given();
      cards[missing].rank.focus();
      throw new Error(`Response ${letter(missing)} has no rank yet.`);
    },
  };
}
