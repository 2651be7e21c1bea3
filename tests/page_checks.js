// What of a page can be told apart, by the colours that the browser computed (WCAG 2.2: 1.4.3 and 1.4.11).
//
// Value: {texts, shapes, faint, overlaps, figures, scrolled}
//   texts, shapes: how many were looked at.
//   faint: what has too little contrast with what lies under it, in words.
//   overlaps: labels of a picture that cover each other.
//   figures: [{caption, description, beneath, labels, marks, cells, rows}] of every chart: whether its table follows
//     it, the texts in its picture, those of them in colours of their own (on cells), the texts and rows of its table.
//   scrolled: [caption, reachable by keyboard] of every table that is wider than its place.
(() => {
  const TEXT = 4.5, GRAPHIC = 3;
  const SHAPES = 'path, use, rect, circle, ellipse, line, polyline, polygon';

  // [r, g, b, a] of a computed colour; null where nothing is painted.
  const paint = (colour, opacity = 1) => {
    if (!colour || !colour.startsWith('rgb')) return null;
    const [r, g, b, a = 1] = colour.match(/[0-9.]+/g).map(Number);
    return a * opacity > 0 ? [r, g, b, a * opacity] : null;
  };
  const over = (top, under) => [0, 1, 2].map(n => top[3] * top[n] + (1 - top[3]) * under[n]);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const opacity = element => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;

  // What an element of the page lies on: the backgrounds of those that hold it.
  const ground = element => {
    if (!element) return [255, 255, 255];
    const own = paint(getComputedStyle(element).backgroundColor);
    return own ? own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement)) : ground(element.parentElement);
  };
  const filled = element => {
    const style = getComputedStyle(element);
    return paint(style.fill, style.fillOpacity * opacity(element));
  };
  const stroked = element => {
    const style = getComputedStyle(element);
    return parseFloat(style.strokeWidth) > 0 ? paint(style.stroke, style.strokeOpacity * opacity(element)) : null;
  };
  const isFilledAt = (shape, x, y) => {
    if (!shape.isPointInFill) {  // a copy of another shape: a cell, or a tick that is only a line
      const box = shape.getBoundingClientRect();
      return Math.min(box.width, box.height) > 4;
    }
    const point = new DOMPoint(x, y).matrixTransform(shape.getScreenCTM().inverse());
    return shape.isPointInFill(point);
  };
  // The areas of a picture under a point, those above `element` left out.
  const below = (element, x, y) => {
    const svg = element.ownerSVGElement;
    const stack = document.elementsFromPoint(x, y)
      .filter(e => e.matches(SHAPES) && e.ownerSVGElement === svg && e !== element)
      .filter(e => e.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING)
      .filter(e => isFilledAt(e, x, y)).map(filled).filter(Boolean);
    return stack.reverse().reduce((under, top) => over(top, under), ground(svg.parentElement));
  };

  const faint = [];
  const see = (what, top, under, least) => {
    const found = contrast(over(top, under), under);
    if (found < least) faint.push(`${what}: ${found.toFixed(2)}, wanted ${least}`);
  };

  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, range = document.createRange();
    range.selectNodeContents(node);
    if (!node.data.trim() || !range.getClientRects().length) continue;
    if (getComputedStyle(element).visibility !== 'visible' || element.closest('svg')) continue;
    texts += 1;
    const colour = paint(getComputedStyle(element).color, opacity(element));
    see(node.data.trim().slice(0, 40), colour || [0, 0, 0, 0], ground(element), TEXT);
  }

  const overlaps = [];
  for (const svg of document.querySelectorAll('svg')) {
    svg.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});
    const labels = [...svg.querySelectorAll('text')].filter(e => e.textContent.trim());
    for (const label of labels) {
      label.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});
      const box = label.getBoundingClientRect();
      texts += 1;
      for (const part of [0.1, 0.5, 0.9]) {
        const point = [box.left + part * box.width, box.top + box.height / 2];
        see(label.textContent, filled(label) || [0, 0, 0, 0], below(label, ...point), TEXT);
      }
    }
    const boxes = labels.map(label => label.getBoundingClientRect());
    boxes.forEach((a, n) => boxes.slice(n + 1).forEach((b, m) => {
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (Math.min(width, height) > 2) overlaps.push(`${labels[n].textContent} | ${labels[n + m + 1].textContent}`);
    }));
  }

  // Shapes in the page's own colours carry data; cells of a heat map say their number, and axes are decoration.
  let shapes = 0;
  const drawn = [...document.querySelectorAll('svg :is(path, use, rect)')]
    .filter(e => /var\(--(first|second|ink|muted)\)/.test(e.getAttribute('style')) && !e.closest('defs'));
  for (const shape of drawn) {
    const box = shape.getBoundingClientRect(), page = ground(shape.ownerSVGElement.parentElement);
    const paints = [filled(shape), stroked(shape)].filter(Boolean);
    if (!paints.length || Math.max(box.width, box.height) < 1) continue;
    shapes += 1;
    const [best] = paints.sort((a, b) => contrast(over(b, page), page) - contrast(over(a, page), page));
    const what = `shape in ${shape.closest('figure')?.querySelector('figcaption').textContent}`;
    see(what, best, page, GRAPHIC);
    if (filled(shape) || !shape.getPointAtLength) continue;
    shape.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});
    for (let n = 0; n <= 40; n++) {  // a line over an area
      const at = shape.getPointAtLength(n / 40 * shape.getTotalLength()).matrixTransform(shape.getScreenCTM());
      see(`${what}, at ${n} of 40`, stroked(shape), below(shape, at.x, at.y), GRAPHIC);
    }
  }

  const figures = [...document.querySelectorAll('figure')].map(figure => {
    const picture = figure.querySelector('.picture'), table = figure.querySelector('table');
    const labels = [...picture.querySelectorAll('text')];
    return {
      description: picture.getAttribute('aria-label'),
      caption: figure.querySelector('figcaption').textContent,
      beneath: Boolean(table && picture.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING),
      labels: labels.map(e => e.textContent.trim()),
      marks: labels.filter(e => !/var\(--ink\)/.test(e.getAttribute('style'))).map(e => e.textContent.trim()),
      cells: [...(table?.querySelectorAll('tbody :is(td, th)') ?? [])].map(e => e.textContent.trim()),
      rows: table?.querySelectorAll('tbody tr').length ?? 0,
    };
  });
  const scrolled = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)
    .map(e => [e.querySelector('caption').textContent, e.tabIndex === 0]);
  return {texts, shapes, faint: [...new Set(faint)], overlaps, figures, scrolled};
})()
