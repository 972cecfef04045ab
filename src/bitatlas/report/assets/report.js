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

  const tip = document.getElementById("tip");
  for (const group of document.querySelectorAll("g.tip")) {
    const title = group.querySelector("title");
    group.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const group = event.target instanceof Element ? event.target.closest("g.tip") : null;
    if (!group) { tip.hidden = true; return; }
    tip.textContent = group.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX + 12, room)) + "px";
    const above = event.clientY - tip.offsetHeight - 12;
    tip.style.top = (above < 8 ? event.clientY + 16 : above) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const folded = () => [...document.querySelectorAll("details:not([open]):not(.source)")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = folded(); for (const part of opened) part.open = true; });
  addEventListener("afterprint", () => { for (const part of opened) part.open = false; opened = []; });
})();
