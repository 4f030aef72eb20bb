// Frontiers and histograms as SVG.
const SHAPES = {
  s: [4, 45],
  D: [4, 0],
  "^": [3, -90],
  v: [3, 90],
  "<": [3, 180],
  ">": [3, 0],
  p: [5, -90],
  "*": [6, 0],
  P: [8, 0],
};

function marker(shape, x, y, size, attributes, ...children) {
  if (!(shape in SHAPES)) return svg("circle", { cx: x, cy: y, r: size, ...attributes }, ...children);
  const [corners, turn] = SHAPES[shape];
  const points = [...Array(corners).keys()].map((i) => {
    const angle = (Math.PI / 180) * (turn + (360 / corners) * i);
    return `${x + 1.25 * size * Math.cos(angle)},${y + 1.25 * size * Math.sin(angle)}`;
  });
  return svg("polygon", { points: points.join(" "), ...attributes }, ...children);
}

// Black would vanish on a dark page.
const colour = (label) => {
  const { color } = DATA.frontier.styles[label] ?? { color: "#888888" };
  return color === "#000000" ? "var(--text)" : color;
};

// A few round numbers between two that are above 0; at least two, however close these are.
function ticks(low, high) {
  for (const digits of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    const found = [];
    for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d++) {
      found.push(...digits.map((digit) => digit * 10 ** d).filter((tick) => tick >= low && tick <= high));
    }
    if (found.length >= 3) return found;
  }
  return [low, high];
}

function frontierFigure(panel) {
  const [width, height, left, right, bottom, top] = [440, 300, 52, 76, 38, 12];
  const scale = (values, from, to) => {
    const [low, high] = [Math.min(...values) / 1.15, Math.max(...values) * 1.15];
    const at = (value) => from + ((to - from) * Math.log(value / low)) / Math.log(high / low);
    return { at, ticks: ticks(low, high) };
  };
  const x = scale(
    panel.points.map((p) => p.l0),
    left,
    width - right,
  );
  const y = scale(
    panel.points.map((p) => p.value),
    height - bottom,
    top,
  );
  const parts = [];
  for (const tick of x.ticks) {
    parts.push(svg("line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: top, y2: height - bottom }));
    parts.push(svg("text", { x: x.at(tick), y: height - bottom + 15, "text-anchor": "middle" }, number(tick)));
  }
  for (const tick of y.ticks) {
    parts.push(svg("line", { class: "grid", x1: left, x2: width - right, y1: y.at(tick), y2: y.at(tick) }));
    parts.push(svg("text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  parts.push(
    svg(
      "text",
      { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" },
      "L0 (active latents per token)",
    ),
  );
  let below = -Infinity; // labels of the lines, top to bottom, at least a line of text apart
  const ends = Object.entries(panel.lines).filter(([, points]) => points.length);
  for (const [label, points] of ends) {
    const path = points.map(([l0, value]) => `${x.at(l0)},${y.at(value)}`).join(" ");
    parts.push(svg("polyline", { points: path, fill: "none", stroke: colour(label), "stroke-width": 1.5 }));
  }
  ends.sort((a, b) => b[1].at(-1)[1] - a[1].at(-1)[1]);
  for (const [label, points] of ends) {
    below = Math.max(below + 13, y.at(points.at(-1)[1]) + 4);
    parts.push(svg("text", { x: width - right + 8, y: below, fill: colour(label) }, label));
  }
  for (const point of panel.points) {
    const style = DATA.frontier.styles[point.label];
    const title = svg("title", {}, `${point.name}: L0 ${number(point.l0)}, ${number(point.value)}`);
    const [px, py] = [x.at(point.l0), y.at(point.value)];
    if (point.shown !== null) {
      parts.push(
        svg("circle", {
          cx: px,
          cy: py,
          r: 11,
          fill: "none",
          stroke: "var(--text)",
          "stroke-width": 2,
          class: "shown",
        }),
      );
      const [dx, dy] = [
        [13, -9],
        [-22, 18],
        [13, 18],
        [-22, -9],
      ][point.shown % 4]; // runs are often at the same place
      parts.push(svg("text", { class: "name", x: px + dx, y: py + dy }, runLetter(point.shown)));
    }
    parts.push(marker(style.marker, px, py, 5, { fill: colour(point.label), stroke: "var(--page)" }, title));
  }
  const marked = panel.points
    .filter((p) => p.shown !== null)
    .map((p) => `${p.name} at L0 ${number(p.l0)}: ${number(p.value)}`);
  const picture = svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": `${panel.title} against L0 of ${panel.points.length} runs; ${marked.join("; ")}`,
    },
    parts,
  );
  return html("figure", {}, html("figcaption", {}, panel.title), picture);
}

// Bars of counts on a log scale, so that one is still seen beside ten thousand.
function barPicture(counts, titles, labels, description) {
  const [width, height, bottom] = [440, 110, 18];
  const largest = Math.log1p(Math.max(...counts, 1));
  const step = width / counts.length;
  const bars = counts.map((count, i) => {
    const tall = count ? 3 + ((height - bottom - 6) * Math.log1p(count)) / largest : 0;
    return svg(
      "rect",
      { class: "bar", x: i * step + 0.5, width: Math.max(1, step - 1), y: height - bottom - tall, height: tall },
      svg("title", {}, `${titles[i]}: ${count.toLocaleString("en")}`),
    );
  });
  const texts = labels.map(([share, text]) =>
    svg(
      "text",
      { x: share * width, y: height - 3, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" },
      text,
    ),
  );
  const base = svg("line", { class: "grid", x1: 0, x2: width, y1: height - bottom, y2: height - bottom });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description }, bars, base, texts);
}

function activationPicture(details) {
  const { bin, counts } = details;
  const titles = counts.map((_, i) => `${number(i * bin)} to ${number((i + 1) * bin)}`);
  const mode = counts.indexOf(Math.max(...counts));
  return barPicture(
    counts,
    titles,
    [
      [0, "0"],
      [0.5, number((counts.length * bin) / 2)],
      [1, number(counts.length * bin)],
    ],
    `Histogram of activations from 0 to ${number(counts.length * bin)}; most are from ${titles[mode]}`,
  );
}

function frequencyPicture(of) {
  const lowest = Math.round(Math.log10(1 / of.n_tokens));
  const counts = Array(-lowest * 4).fill(0);
  for (const share of of.frequency) {
    if (share) counts[Math.max(0, Math.min(counts.length - 1, Math.floor((Math.log10(share) - lowest) * 4)))] += 1;
  }
  const edge = (i) => percent(10 ** (lowest + i / 4));
  const labels = [...Array(1 - lowest).keys()].map((i) => [i / -lowest, `${number(100 * 10 ** (lowest + i))} %`]);
  return barPicture(
    counts,
    counts.map((_, i) => `${edge(i)} to ${edge(i + 1)}`),
    labels,
    `Latents by the share of tokens on which they fire, from ${edge(0)} to 100 %`,
  );
}
