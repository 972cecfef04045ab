// The budget slider: shows one stop at a time, paints the heat map with its bits, hands out its plan.json. Without this file all stops stand below each other.
(() => {
  "use strict";
  const block = document.getElementById("data");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const section = document.getElementById("budget");
  const stops = [...section.querySelectorAll(".stop")];
  const size = document.getElementById("size");
  const pick = (id) => Number(document.getElementById(id)?.value ?? 0);
  const marks = [...section.querySelectorAll("[data-point]")].filter((mark) => mark.tagName === "g");

  // --- plan.json, to the byte ---
  const letters = "0123456789abcdefghijklmnopqrstuvwxyz";
  const fileOf = (plan) => {
    if (!plan.tail) return plan.head;
    const line = (name, i) => `  ${JSON.stringify(name)}: ${JSON.stringify(data.formats[letters.indexOf(plan.modules[i])])}`;
    return plan.head + data.modules.map(line).join(",\n") + plan.tail;
  };
  const copied = async (text) => {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* no permission, or no secure page */ }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  const button = (text, label, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "small";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", async () => {
      if (await act() === false) return;
      made.textContent = "Done";
      setTimeout(() => { made.textContent = text; }, 1200);
    });
    return made;
  };
  const download = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  stops.forEach((stop, i) => {
    const name = stop.dataset.place.split("/").pop();
    stop.querySelector(".buttons").append(
      button("Copy plan.json", `Copy ${name}`, () => copied(fileOf(data.plans[i]))),
      button("Download", `Download ${name}`, () => download(name, fileOf(data.plans[i]))));
    for (const line of stop.querySelectorAll(".commands li")) {
      const text = line.textContent;
      line.append(button("Copy", `Copy: ${text}`, () => copied(text)));
    }
  });

  // --- the heat map ---
  const why = (plan, unit, at) => {
    if (!unit || at < 0) return "";
    const [modules, steps] = data.units[unit];
    const others = modules - 1;
    const it = others ? `it and the ${others} that share${others === 1 ? "s" : ""} its format` : "it";
    const said = [];
    if (at < steps.length) said.push(`Raising ${it} to ${data.order[at + 1]} would cost ${steps[at][0]} and ${steps[at][1]} nats/token.`);
    if (at > 0) said.push(`Lowering ${it} to ${data.order[at - 1]} would free ${steps[at - 1][0]} and ${steps[at - 1][2]} nats/token.`);
    const other = plan.raises.find(([name]) => name !== unit);
    return " " + [...said, ...(other ? [other[1]] : [])].join(" ");
  };
  const paint = (plan) => {
    for (const group of section.querySelectorAll("[data-cell]")) {
      const cell = Number(group.dataset.cell);
      const [title, members, unit] = data.cells[cell];
      const names = [...new Set(members.map((i) => data.formats[letters.indexOf(plan.modules[i])] ?? "kept as it is"))].sort();
      const [depth, css] = data.shades[plan.bits[cell]] ?? [0, "on-light"];
      group.querySelector("rect").setAttribute("fill-opacity", depth.toFixed(2));
      const number = group.querySelector("text");
      if (number) { number.textContent = plan.bits[cell]; number.setAttribute("class", css); }
      group.dataset.tip = `${title}: ${names.join(", ")}.${unit in data.units ? why(plan, unit, data.order.indexOf(names[0])) : ""}`;
    }
  };

  // --- memory ---
  const remember = () => {
    if (!data.memory[0].length) return;
    const context = document.getElementById("context");
    stops.forEach((stop, i) => {
      const [all, parts] = data.memory[i][pick("cache")][pick("context")];
      stop.querySelector(".memory b").textContent = all;
      stop.querySelector(".memory small").textContent = parts;
      stop.querySelector(".memory .at").textContent = context.selectedOptions[0].textContent;
    });
  };

  const show = () => {
    const at = Number(size.value);
    stops.forEach((stop, i) => { stop.hidden = i !== at; });
    const told = stops[at].dataset.told;
    document.getElementById("told").textContent = told;
    size.setAttribute("aria-valuetext", told);
    section.querySelectorAll(".marks li").forEach((mark, i) => mark.classList.toggle("now", i === at));
    for (const mark of marks) mark.classList.toggle("now", mark.dataset.point === stops[at].dataset.point);
    paint(data.plans[at]);
  };
  for (const part of section.querySelectorAll(".dial")) part.hidden = false;
  section.classList.add("sliding");
  size.addEventListener("input", show);
  for (const id of ["context", "cache"]) document.getElementById(id)?.addEventListener("change", remember);
  section.querySelectorAll(".marks li").forEach((mark, i) => mark.addEventListener("click", () => { size.value = i; show(); }));
  remember();
  show();
})();
