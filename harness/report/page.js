// Hover values and the legend's switches. Without the script the page is complete but static.
"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
const tip = document.getElementById("tip");
const off = new Set(); // numbers of the runs that are switched off
const runsOf = (element) => element.dataset.runs.split(" ").filter(Boolean);

function showRuns() {
  for (const element of document.querySelectorAll(".series, tr[data-runs]")) {
    const runs = runsOf(element); // empty for elements that belong to no run
    element.classList.toggle("off", runs.length > 0 && runs.every((run) => off.has(run)));
  }
  for (const button of document.querySelectorAll("#legend [aria-pressed]")) {
    button.setAttribute("aria-pressed", String(!runsOf(button).every((run) => off.has(run))));
  }
  hide();
}

document.getElementById("legend").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const every = button.dataset.show;
  const runs = every
    ? [...document.querySelectorAll("#legend .group")].flatMap(runsOf)
    : runsOf(button);
  const on = every ? every === "all" : button.getAttribute("aria-pressed") === "false";
  for (const run of runs) on ? off.delete(run) : off.add(run);
  showRuns();
});

const ruler = (axis) => {
  const f = axis.scale === "linear" ? (v) => v : Math.log;
  const [low, high] = [f(axis.low), f(axis.high)];
  return (v) => axis.start + ((f(v) - low) / (high - low)) * (axis.end - axis.start);
};
const number = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
const quantity = (axis, value) => `${axis.label} ${number(value)}${axis.unit ? " " + axis.unit : ""}`;

// each visible point of a figure: its pixel, its series, its index there
function points(svg) {
  const plot = plots[svg.dataset.figure];
  const [x, y] = [ruler(plot.x), ruler(plot.y)];
  const drawn = svg.querySelectorAll(".series");
  const found = [];
  plot.series.forEach((series, s) => {
    if (drawn[s].classList.contains("off")) return;
    series.x.forEach((value, i) => {
      if (series.hover && !series.hover[i]) return;
      found.push({ left: x(value), top: y(series.y[i]), series, i, look: drawn[s] });
    });
  });
  return found;
}

function show(svg, point) {
  const plot = plots[svg.dataset.figure];
  const { series, i } = point;
  svg.querySelector(".here")?.parentNode.remove();
  const mark = document.createElementNS(svg.namespaceURI, "g");
  mark.setAttribute("class", point.look.getAttribute("class").replace("series", ""));
  const circle = mark.appendChild(document.createElementNS(svg.namespaceURI, "circle"));
  circle.setAttribute("class", "here");
  circle.setAttribute("cx", point.left);
  circle.setAttribute("cy", point.top);
  circle.setAttribute("r", 5);
  svg.append(mark);
  const name = document.createElement("b");
  name.textContent = series.name;
  const value = series.hover
    ? series.hover[i]
    : `${quantity(plot.x, series.x[i])}: ${quantity(plot.y, series.y[i])}`;
  tip.replaceChildren(name, value);
  tip.hidden = false;
  const box = svg.getBoundingClientRect();
  const size = box.width / svg.viewBox.baseVal.width;
  const [left, top] = [box.left + point.left * size, box.top + point.top * size];
  const room = document.documentElement.clientWidth - tip.offsetWidth - 6;
  tip.style.left = `${Math.max(6, Math.min(left + 12, room))}px`;
  tip.style.top = `${top - tip.offsetHeight - 12 > 0 ? top - tip.offsetHeight - 12 : top + 16}px`;
}

function hide() {
  tip.hidden = true;
  for (const circle of document.querySelectorAll(".here")) circle.parentNode.remove();
}

for (const svg of document.querySelectorAll("svg.plot")) {
  let at = null; // the point that the keys have reached
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const size = svg.viewBox.baseVal.width / box.width;
    const [left, top] = [(event.clientX - box.left) * size, (event.clientY - box.top) * size];
    let best = null;
    let least = 60 ** 2;
    for (const point of points(svg)) {
      const distance = (point.left - left) ** 2 + (point.top - top) ** 2;
      if (distance < least) [best, least] = [point, distance];
    }
    best ? show(svg, best) : hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Escape: 0 }[event.key];
    if (step === undefined) return;
    if (step === 0) return hide();
    const found = points(svg);
    if (!found.length) return;
    at = at === null ? 0 : (at + step + found.length) % found.length;
    show(svg, found[Math.min(at, found.length - 1)]);
    event.preventDefault();
  });
}
