"use strict";
// Draws the charts of the page, in the colours of light or dark, and again when that changes.

const specs = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const palette = () => dark.matches
  ? {
      ink: "#f2f1ed", dim: "#a3a199", line: "#33322f", surface: "#1b1b1a",
      accepted: "#4b94e8", refused: "#e08a4a",
      groups: ["#4b94e8", "#e08a4a", "#58b98a", "#d96a7b", "#a58be0", "#c9b04a", "#4db6c4", "#d482bb", "#9aa0a6", "#8fbf5a"],
    }
  : {
      ink: "#1c1b19", dim: "#6a6862", line: "#e2e1dc", surface: "#fcfcfb",
      accepted: "#2a78d6", refused: "#d0682a",
      groups: ["#2a78d6", "#d0682a", "#2f8f63", "#c0394f", "#7a57c9", "#94790f", "#1d8796", "#b04a93", "#6b7077", "#5d8a25"],
    };

// A chart names its colours by what they mean.
function coloured(value, colours, key) {
  if (Array.isArray(value)) return value.map((item) => coloured(item, colours, key));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) =>
      [name, name === "data" || name === "domain" ? item : coloured(item, colours, name)]));
  }
  const named = key === "color" || key === "stroke" || key === "range";
  return named && typeof value === "string" && value in colours ? colours[value] : value;
}

const NARROW = 560;
const PADDING = 5; // Vega's own, around each chart

// A round chart has its size in numbers; where there is less room, all of them shrink.
function fitted(spec, room) {
  const least = room - 2 * PADDING;
  if (!spec.usermeta?.radial || least >= spec.width) return spec;
  const share = least / spec.width;
  const values = spec.data.values.map((arc) => ({
    ...arc, inner: arc.inner * share, outer: arc.outer * share, centre: arc.centre * share,
  }));
  return { ...spec, width: least, height: spec.height * share, data: { values } };
}

function config(colours, room) {
  const axis = { domainColor: colours.line, tickColor: colours.line, gridColor: colours.line };
  return {
    background: null, font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...axis, labelColor: colours.dim, titleColor: colours.dim, titleFontWeight: "normal", tickCount: 5 },
    legend: {
      labelColor: colours.ink, titleColor: colours.dim, titleFontWeight: "normal",
      ...(room < NARROW ? { orient: "bottom" } : {}),
    },
    text: { color: colours.ink }, rule: { color: colours.ink },
  };
}

// Vega's own tooltip is HTML; this one knows text alone.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

function tooltip(handler, event, item, value) {
  tip.hidden = value === null || value === undefined || value === "";
  if (tip.hidden) return;
  const lines = typeof value === "object" ? Object.entries(value) : [["", value]];
  tip.replaceChildren(...lines.map(([name, text]) => {
    const line = document.createElement("div");
    const label = document.createElement("span");
    const content = document.createElement("bdi");
    label.textContent = name;
    content.textContent = String(text);
    line.append(label, content);
    return line;
  }));
  const room = { x: innerWidth - tip.offsetWidth - 8, y: innerHeight - tip.offsetHeight - 8 };
  tip.style.left = `${Math.max(0, Math.min(event.clientX + 14, room.x))}px`;
  tip.style.top = `${Math.max(0, Math.min(event.clientY + 14, room.y))}px`;
}

let drawn = [];
let width = 0;
async function draw() {
  width = document.documentElement.clientWidth;
  drawn.splice(0).forEach((view) => view.finalize());
  const colours = palette();
  for (const [name, spec] of Object.entries(specs)) {
    const room = document.getElementById(name).clientWidth;
    const options = {
      actions: false, ast: true, defaultStyle: false, renderer: "canvas", tooltip, config: config(colours, room),
    };
    drawn.push(await vegaEmbed(`#${name}`, coloured(fitted(spec, room), colours), options));
  }
  document.body.dataset.drawn = String(drawn.length);
}

let drawing = draw();
const again = () => { drawing = drawing.then(draw); };
dark.addEventListener("change", again);
addEventListener("resize", () => { if (document.documentElement.clientWidth !== width) again(); });
