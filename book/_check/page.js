// Runs inside an opened page and returns a list of what is wrong with it.
// `width` is "desktop" or "phone", `theme` is "light" or "dark".
({ width, theme }) => {
  const faults = [];
  const say = (text) => faults.push(text);
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // The document and every shadow tree below it: figures one can move have those.
  const roots = [document];
  for (const root of roots)
    for (const one of all("*", root)) if (one.shadowRoot) roots.push(one.shadowRoot);
  const everywhere = (selector) => roots.flatMap((root) => all(selector, root));

  const describe = (element) => {
    const id = element.id ? `#${element.id}` : "";
    const name = element.getAttribute("class");
    return element.localName + id + (name ? `.${name.trim().split(/\s+/)[0]}` : "");
  };

  function mathematics() {
    const wanted = all(".math").length;
    const drawn = all("mjx-container").length;
    if (wanted !== drawn) say(`${wanted} formulas, but ${drawn} drawn by MathJax`);
    for (const one of all("[data-mjx-error]"))
      say(`bad TeX: ${one.getAttribute("data-mjx-error")}`);
    for (const one of all("mjx-container > svg")) {
      const box = one.closest(".math") || one.parentElement;
      const hides = (it) => /hidden|clip/.test(getComputedStyle(it).overflowX);
      if (!hides(box) && !hides(one.parentElement)) continue;
      if (one.getBoundingClientRect().width <= box.clientWidth + 2) continue;
      if (/auto|scroll/.test(getComputedStyle(one.parentElement).overflowX)) continue;
      const [item] = MathJax.startup.document.getMathItemsWithin(box);
      say(`formula cut off at ${width} width: ${short(item ? item.math : "")}`);
    }
  }

  function names() {
    for (const one of everywhere("img"))
      if (!one.alt.trim() && one.getAttribute("aria-hidden") !== "true")
        say(`image without alt text: ${one.getAttribute("src")}`);
    for (const one of everywhere('svg[role="img"]')) {
      if (one.closest('mjx-container, [aria-hidden="true"]')) continue;
      const label = one.getAttribute("aria-label") || one.querySelector("title")?.textContent;
      if (!(label || "").trim())
        say(`svg with role=img without aria-label: ${describe(one)}`);
    }
    const unknown = new Set(everywhere(":not(:defined)").map((one) => one.localName));
    for (const name of unknown)
      if (!name.startsWith("mjx-")) say(`<${name}> is nowhere defined`);
  }

  function overflow() {
    const room = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= room + 1) return;
    const visible = (box) => getComputedStyle(box).overflowX === "visible";
    const clipped = (box) =>
      box !== document.body && (!visible(box) || clipped(box.parentElement));
    const wide = all("body *").filter(
      (one) =>
        !clipped(one) &&
        one.getBoundingClientRect().left + one.scrollWidth > room + 1 &&
        ![...one.children].some(
          (child) => child.getBoundingClientRect().left + child.scrollWidth > room + 1,
        ),
    );
    const who = [...new Set(wide.map(describe))].slice(0, 4).join(", ");
    const excess = document.documentElement.scrollWidth - room;
    say(`wider than the ${width} screen by ${excess}px: ${who}`);
  }

  // --- contrast of the words in figures ---------------------------------------
  const pen = document.createElement("canvas").getContext("2d", {
    willReadFrequently: true,
  });

  function rgba(colour) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }

  const over = (top, below) =>
    [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);

  function pageColour(element) {
    const layers = [];
    for (let box = element; box; ) {
      const colour = rgba(getComputedStyle(box).backgroundColor);
      layers.push(colour);
      if (colour[3] === 1) break;
      box = box.parentElement || (box.getRootNode() || {}).host;
    }
    return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
  }

  function luminance(colour) {
    const [r, g, b] = colour.slice(0, 3).map((channel) => {
      const c = channel / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function contrast(one, other) {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }

  function paint(shape) {
    const style = getComputedStyle(shape);
    if (style.fill === "none" || style.fill.startsWith("url")) return null;
    const colour = rgba(style.fill);
    colour[3] *= style.fillOpacity * style.opacity;
    return colour[3] > 0.01 ? colour : null;
  }

  // Matplotlib draws words as <use> of glyphs inside <g id="…text_3">.
  const WORDS = 'text, g[id*="text_"] use';

  function figureContrast(figure) {
    const words = all(WORDS, figure).filter((one) => !one.closest("defs"));
    const spoken = new Set(all('g[id*="text_"] *', figure));
    const shapes = all("path, rect, circle, ellipse, polygon, image", figure)
      .filter((one) => !one.closest("defs, clipPath") && !spoken.has(one))
      .map((one) => ({ one, box: one.getBoundingClientRect() }));
    const page = pageColour(figure);
    const seen = new Set();
    for (const word of words) {
      const box = word.getBoundingClientRect();
      const x = box.x + box.width / 2;
      const y = box.y + box.height / 2;
      const ink = paint(word);
      if (!box.width || !ink) continue;
      let ground = page;
      for (const { one, box } of shapes) {
        if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
        const after = Node.DOCUMENT_POSITION_FOLLOWING;
        if (!(one.compareDocumentPosition(word) & after)) continue;
        if (one.localName === "image") { ground = null; break; }
        const point = new DOMPoint(x, y).matrixTransform(one.getScreenCTM().inverse());
        const colour = one.isPointInFill(point) && paint(one);
        if (colour) ground = over(colour, ground);
      }
      if (!ground) continue;
      const ratio = contrast(over(ink, ground), ground);
      const pair = `${over(ink, ground).map(Math.round)} on ${ground.map(Math.round)}`;
      if (ratio < 4.5 && !seen.has(pair)) {
        seen.add(pair);
        say(`words in a figure too pale in ${theme} mode: contrast ${
          ratio.toFixed(1)} < 4.5, rgb ${pair.replace(/,1\b/g, "")}, in “${
          short(figure.getAttribute("aria-label") || describe(figure))}”`);
      }
    }
  }

  if (document.documentElement.dataset.theme !== undefined &&
      document.documentElement.dataset.theme !== theme)
    say(`theme is ${document.documentElement.dataset.theme}, not ${theme}`);
  mathematics();
  names();
  overflow();
  for (const figure of everywhere("svg"))
    if (!figure.closest("mjx-container") && !figure.parentElement?.closest("svg"))
      figureContrast(figure);
  return faults;
}
