// Theme switch and tooltips of a bitatlas report. Without this file the page loses nothing else.
(() => {
  "use strict";
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
  dark.addEventListener("change", label);
  label();

  // A link to a folded table opens it.
  const unfold = () => {
    const end = document.getElementById(location.hash.slice(1));
    if (end instanceof HTMLDetailsElement) end.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();

  const tip = document.getElementById("tip");
  for (const group of document.querySelectorAll("g.tip")) {
    const title = group.querySelector("title");
    group.dataset.tip = title.textContent;
    title.remove();
  }
  const tell = (group, x, y) => {
    tip.textContent = group.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(x + 12, room)) + "px";
    const above = y - tip.offsetHeight - 12;
    tip.style.top = (above < 8 ? y + 16 : above) + "px";
  };
  const show = (event) => {
    const group = event.target instanceof Element ? event.target.closest("g.tip") : null;
    if (group) tell(group, event.clientX, event.clientY);
    else tip.hidden = true;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // By keyboard: a chart takes the focus, arrows go from mark to mark (in the map of bits: to the cell in their direction), Escape leaves.
  const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  const middle = (group) => {
    const box = group.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const next = (groups, from, [dx, dy]) => {
    if (!from.dataset.cell) return groups[groups.indexOf(from) + dx + dy] ?? from;
    const [x, y] = middle(from);
    let best = from, least = Infinity;
    for (const group of groups) {
      const [a, b] = middle(group);
      const along = (a - x) * dx + (b - y) * dy;
      const distance = along + 3 * Math.abs((a - x) * dy + (b - y) * dx);
      if (along > 0.5 && distance < least) { best = group; least = distance; }
    }
    return best;
  };
  for (const chart of document.querySelectorAll("svg.chart")) {
    const groups = [...chart.querySelectorAll("g.tip")];
    if (!groups.length) continue;
    let at = null;
    const go = (group) => {
      at?.classList.remove("at");
      at = group;
      if (!group) { tip.hidden = true; return; }
      group.classList.add("at");
      tell(group, ...middle(group));
    };
    chart.tabIndex = 0;
    chart.setAttribute("aria-description", "Arrow keys go from mark to mark.");
    chart.addEventListener("keydown", (event) => {
      const way = ways[event.key];
      if (event.key === "Escape") go(null);
      if (!way) return;
      event.preventDefault();
      go(at ? next(groups, at, way) : groups[0]);
    });
    chart.addEventListener("blur", () => go(null));
  }

  const folded = () => [...document.querySelectorAll("details:not([open]):not(.source)")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = folded(); for (const part of opened) part.open = true; });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; opened = []; });
})();
