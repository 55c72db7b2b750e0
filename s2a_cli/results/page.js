"use strict";
// A click on a head sorts, numbers by size and missing ones last; the filter keeps lines that hold all words.
const sortable = (text) => { const found = text.replace(/,/g, "").match(/^~?-?\d+(\.\d+)?/); return found ? parseFloat(found[0].replace("~", "")) : null; };
const compare = (a, b, turn) => {
  const x = sortable(a), y = sortable(b);
  if (a === "–" || b === "–") return (a === "–") - (b === "–");
  return turn * (x !== null && y !== null ? x - y : a.localeCompare(b, undefined, { numeric: true }));
};
for (const head of document.querySelectorAll("th")) head.firstChild.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const turn = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
  body.append(...[...body.rows].map((row) => [row.cells[column].textContent, row]).sort((a, b) => compare(a[0], b[0], turn)).map((pair) => pair[1]));
});
for (const input of document.querySelectorAll("input[data-for]")) input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean), rows = document.getElementById(input.dataset.for).tBodies[0].rows;
  let shown = 0;
  for (const row of rows) {
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  document.querySelector(`[data-count="${input.dataset.for}"]`).textContent = words.length ? `${shown} of ${rows.length} lines` : `${rows.length} lines`;
});
