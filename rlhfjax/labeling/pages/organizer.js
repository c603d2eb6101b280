// The organizer's page: counts, agreement, labelers and their links, files, and the end.

import { ask, byId, el, pause } from "./dom.js";

const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(0)} %`);
const seconds = (value) => (value === null ? "–" : `${value.toFixed(0)} s`);

async function refresh() {
  for (;;) {
    try {
      show(await ask("progress"));
      byId("message").textContent = "";
    } catch (problem) {
      byId("message").textContent = problem.message;
    }
    await pause(5000);
  }
}

function show(progress) {
  const { labels, wanted, agreement } = progress;
  const bar = byId("bar");
  bar.style.setProperty("--at", wanted ? Math.min(1, labels / wanted) : 0);
  bar.setAttribute("aria-valuemax", wanted);
  bar.setAttribute("aria-valuenow", labels);
  const kappa = agreement.agreement_kappa;
  const numbers = [
    [`${labels} of ${wanted}`, "labels"],
    [progress.items, "items"],
    [progress.skipped, "skipped"],
    [percent(agreement.agreement), "agreement, a tie counts ½"],
    [kappa === undefined ? "–" : kappa.toFixed(2), "Fleiss’ κ"],
    [agreement.agreement_pairs ?? 0, "pairs that two labelers ranked"],
  ];
  byId("numbers").replaceChildren(
    ...numbers.map(([value, text]) => {
      return el("div", { class: "card" }, el("b", { text: value }), el("span", { text }));
    }),
  );
  showLabelers(progress.labelers);
  byId("files").replaceChildren(
    ...progress.files.map((name) => el("li", {}, el("a", { href: `api/${name}`, text: name }))),
  );
  byId("open-finish").disabled = progress.is_complete;
  if (progress.is_complete) byId("end-lead").textContent = "The collection has ended.";
}

function showLabelers(labelers) {
  const table = byId("labelers");
  const focused = document.activeElement?.dataset?.name;
  const titles = ["", "Link", "Labels", "Skipped", "Per label", "Hours", "With others", "Calibration", "Test"];
  const head = el("tr", {}, ...titles.map((text) => el("th", { text, scope: "col" })));
  const rows = labelers.map((one) => {
    const link = new URL(one.path, location.href).href;
    const copy = el("button", { type: "button", class: "quiet", text: "Copy", "data-name": one.name });
    copy.setAttribute("aria-label", `Copy the link of ${one.name}`);
    copy.addEventListener("click", () => copyLink(copy, link));
    const open = el("a", { href: link, text: "Open", "aria-label": `Open the page of ${one.name}` });
    const test = one.screening === null ? "–" : `${percent(one.screening)}${one.admitted ? " ✓" : ""}`;
    const cells = [one.labels, one.skipped, seconds(one.seconds), one.hours.toFixed(1)];
    cells.push(percent(one.with_others), percent(one.calibration), test);
    return el(
      "tr",
      {},
      el("th", { scope: "row", text: one.name }),
      el("td", { class: "nowrap" }, open, " ", copy),
      ...cells.map((text) => el("td", { class: "n", text })),
    );
  });
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: "9", text: "Nobody is invited yet." })));
  table.replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
  if (focused) table.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
}

async function copyLink(button, link) {
  try {
    await navigator.clipboard.writeText(link);
    button.textContent = "Copied";
  } catch {
    prompt("The link:", link); // browsers give the clipboard to https and to this machine alone
  }
}

byId("invite").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("invite", { name: byId("new-name").value });
    byId("new-name").value = "";
    show(await ask("progress"));
  } catch (problem) {
    byId("message").textContent = problem.message;
  }
});
byId("open-finish").addEventListener("click", () => byId("finish").showModal());
byId("close-finish").addEventListener("click", () => byId("finish").close());
byId("confirm-finish").addEventListener("click", async () => {
  byId("finish").close();
  await ask("finish", {});
  show(await ask("progress"));
});
refresh();
