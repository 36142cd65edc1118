// Draws the page's charts: one after the other, in the colours of the reader's scheme, with legends of buttons.
"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const charts = [...document.querySelectorAll(".chart")];
  const hidden = new Map(charts.map((chart) => [chart, new Set()]));
  const pixelsOfPrint = 660;
  // A cell of a heat map that has room for its number, and its part of what stands beside the map.
  const pixelsOfCell = 72;
  let printing = false;

  const recoloured = (value) => {
    if (typeof value === "string") return Object.hasOwn(colours, value) ? colours[value] : value;
    if (Array.isArray(value)) return value.map(recoloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, recoloured(part)]));
  };

  const figureOf = (chart) => {
    const figure = JSON.parse(document.getElementById(chart.dataset.figure).textContent);
    return dark.matches && !printing ? recoloured(figure) : figure;
  };

  const groupOf = (trace) => trace.legendgroup ?? trace.name;

  const draw = (chart) => {
    const figure = figureOf(chart);
    figure.layout.showlegend = false;
    // A finger that moves over a chart moves the page.
    figure.layout.dragmode = coarse.matches ? false : "zoom";
    if (printing) figure.layout.width = pixelsOfPrint;
    for (const trace of figure.data) {
      trace.visible = !hidden.get(chart).has(groupOf(trace));
      if (trace.type === "heatmap" && chart.clientWidth < pixelsOfCell * trace.x.length) delete trace.texttemplate;
    }
    Plotly.react(chart, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    chart.dataset.drawn = "yes";
    legend(chart, figure);
  };

  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // Within a square of 10 around (0, 0).
  const paths = {
    circle: "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    square: "M-4.5-4.5H4.5V4.5H-4.5Z",
    diamond: "M0-6L6 0L0 6L-6 0Z",
    cross: "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    x: "M0-2.2L3-5L5-3L2.2 0L5 3L3 5L0 2.2L-3 5L-5 3L-2.2 0L-5-3L-3-5Z",
    star: "M0-6L1.6-2L6-1.9L2.5.8L3.7 5L0 2.6L-3.7 5L-2.5.8L-6-1.9L-1.6-2Z",
    hexagon: "M0-5.5L4.8-2.8V2.8L0 5.5L-4.8 2.8V-2.8Z",
    pentagon: "M0-5.5L5.3-1.7L3.3 4.5H-3.3L-5.3-1.7Z",
    "triangle-up": "M0-5.5L5.2 4H-5.2Z",
    "triangle-down": "M0 5.5L5.2-4H-5.2Z",
  };
  const dashes = { dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "9 3" };

  const swatch = (trace) => {
    const drawing = svg("svg", { width: 34, height: 14, viewBox: "-17 -7 34 14", "aria-hidden": "true" });
    const colour = trace.marker?.color ?? trace.line?.color;
    if (trace.type === "bar") {
      const shape = trace.marker.pattern?.shape;
      const lines = { "/": "M-8 5L2-5M-2 5L8-5", x: "M-8 5L2-5M-2 5L8-5M-8-5L2 5M-2-5L8 5" }[shape];
      const box = { x: -8, y: -5, width: 16, height: 10, fill: lines ? "none" : colour, stroke: colour };
      drawing.append(svg("rect", box));
      if (lines) drawing.append(svg("path", { d: lines, stroke: colour, "stroke-width": 1.5 }));
      return drawing;
    }
    if (trace.mode.includes("lines")) {
      const dash = dashes[trace.line.dash] ?? "none";
      const line = { x1: -17, x2: 17, y1: 0, y2: 0, stroke: trace.line.color, "stroke-width": 2 };
      drawing.append(svg("line", { ...line, "stroke-dasharray": dash }));
    }
    if (trace.marker) {
      const [shape, open] = [trace.marker.symbol.replace("-open", ""), trace.marker.symbol.endsWith("-open")];
      const paint = { fill: open ? "none" : colour, stroke: colour, "stroke-width": open ? 2 : 0 };
      drawing.append(svg("path", { d: paths[shape] ?? paths.circle, ...paint }));
    }
    return drawing;
  };

  // Plotly's names have no markup but these entities.
  const words = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  const legend = (chart, figure) => {
    const named = figure.data.filter((trace) => trace.name && trace.showlegend !== false);
    if (named.length < 2) return;
    let list = chart.parentElement.querySelector(".legend");
    const focused = list?.contains(document.activeElement) ? document.activeElement.dataset.group : null;
    if (!list) {
      list = document.createElement("ul");
      list.className = "legend";
      list.setAttribute("aria-label", "Shown in the chart");
      chart.before(list);
    }
    list.replaceChildren(
      ...named.map((trace) => {
        const [item, button] = [document.createElement("li"), document.createElement("button")];
        button.type = "button";
        button.dataset.group = groupOf(trace);
        button.setAttribute("aria-pressed", String(!hidden.get(chart).has(groupOf(trace))));
        button.append(swatch(trace), words(trace.name));
        button.addEventListener("click", () => {
          const off = hidden.get(chart);
          if (!off.delete(groupOf(trace))) off.add(groupOf(trace));
          draw(chart);
        });
        item.append(button);
        return item;
      }),
    );
    if (focused !== null) {
      [...list.querySelectorAll("button")].find((button) => button.dataset.group === focused)?.focus();
    }
  };

  // A chart has no size before it is seen.
  const isOpen = (chart) => chart.closest("details:not([open])") === null;
  const drawAll = () => charts.filter(isOpen).forEach(draw);
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => {
      [...details.querySelectorAll(".chart:not([data-drawn])")].filter(isOpen).forEach(draw);
    });
  }

  const drawFrom = (place) => {
    if (place === charts.length) {
      document.documentElement.dataset.drawn = String(charts.length);
      return;
    }
    if (!charts[place].dataset.drawn && isOpen(charts[place])) draw(charts[place]);
    // The page answers between two charts.
    setTimeout(() => drawFrom(place + 1), 0);
  };
  setTimeout(() => drawFrom(0), 0);

  dark.addEventListener("change", () => {
    for (const chart of charts) delete chart.dataset.drawn;
    drawAll();
  });
  const opened = new Set();
  window.addEventListener("beforeprint", () => {
    printing = true;
    for (const details of document.querySelectorAll("details[data-print]:not([open])")) {
      details.open = true;
      opened.add(details);
    }
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    for (const details of opened) details.open = false;
    opened.clear();
    drawAll();
  });
})();
