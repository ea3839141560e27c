"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const classes = data.classes && new Map(data.classes); // label → colour, of a classification
  const STATUS = { ok: classes ? "classified" : "captioned", nodata: "no data", cloud: "cloud", read_error: "cannot be read" };
  const [frame, plane, picture, grid, tip, list] = ["frame", "plane", "picture", "grid", "tip", "list"].map(byId);
  const filter = byId("filter");
  const ZOOMS = [1, 1.5, 2, 3, 4, 6, 8];
  const counting = new Intl.NumberFormat("en");
  const byText = new Intl.Collator("en", { numeric: true });

  let scene; // what is shown: its entry of data.scenes
  let tiles = []; // its tiles as objects
  let places = new Map(); // "row,col" → index
  let rects = [], items = []; // a rectangle and a list item per tile
  let rings = {}; // outlines of the tile walked to and of the pinned one
  let order = []; // indices as the list shows them
  let matches = []; // whether a tile passes filter and legend
  let cursor = -1, pinned = -1, zoom = 0;
  const shown = new Set(Object.keys(STATUS));

  function make(tag, attributes = {}, text = null) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  function shape(attributes) {
    const rect = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries(attributes)) rect.setAttribute(name, value);
    return rect;
  }

  function describe(target, pairs) {
    const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
    target.replaceChildren(...known.map(([term, value]) => {
      const pair = target.id === "facts" ? make("div") : document.createDocumentFragment();
      pair.append(make("dt", {}, term), make("dd", { dir: "auto" }, value));
      return pair;
    }));
  }

  const words = (tile) => (tile.caption === null
    ? STATUS[tile.status] + (tile.message ? `: ${tile.message}` : "") : tile.caption);
  const place = (tile) => `row ${tile.row}, column ${tile.col}`;
  const signed = (score, digits) => score.toFixed(digits).replace("-", "\u2212");
  const percent = (share) => (share === null ? null : `${(100 * share).toFixed(share && share < 0.1 ? 2 : 0)} %`);
  const degrees = (value, signs) => `${Math.abs(value).toFixed(5)}° ${signs[value < 0 ? 1 : 0]}`;

  // ---- scenes

  function show(number) {
    scene = data.scenes[number];
    tiles = scene.tiles.map((values) => Object.fromEntries(data.fields.map((name, i) => [name, values[i]])));
    places = new Map(tiles.map((tile, i) => [`${tile.row},${tile.col}`, i]));
    cursor = pinned = -1;
    byId("title").textContent = scene.name;
    const tally = Object.keys(STATUS).map((status) => [status, tiles.filter((t) => t.status === status).length]);
    describe(byId("facts"), [
      ["Product", scene.product], ["Acquired", scene.datetime], ["MGRS tile", scene.mgrs],
      ["Size", `${counting.format(scene.width)} × ${counting.format(scene.height)} px`], ["CRS", scene.crs],
      ["Tiles", counting.format(tiles.length)], ["Model", scene.model], ["Rendering", scene.rendering],
    ]);
    byId("warnings").replaceChildren(...scene.warnings.map((text) => make("li", { dir: "auto" }, text)));
    drawLegend(tally);
    drawMap();
    drawList();
    tip.hidden = true;
    showDetail();
    apply();
  }

  function drawLegend(tally) {
    const rows = tally.filter(([status, count]) => count || status === "ok").map(([status, count]) => {
      const label = make("label");
      const box = make("input", { type: "checkbox", value: status });
      box.checked = shown.has(status);
      const swatch = document.createElementNS(SVG, "svg");
      const side = 18 * patternScale(); // so that patterns look as they do on the map
      swatch.setAttribute("aria-hidden", "true");
      swatch.setAttribute("viewBox", `0 0 ${side} ${side}`);
      swatch.append(shape({ class: `tile ${status}`, width: side, height: side }));
      label.append(box, swatch, make("span", {}, STATUS[status]), make("b", {}, counting.format(count)));
      return label;
    });
    const kinds = [...(classes || [])].map(([label, colour]) => {
      const count = tiles.filter((tile) => tile.caption === label).length;
      const row = make("div", { class: "class" });
      const swatch = make("i", { "aria-hidden": "true" });
      swatch.style.background = colour;
      row.append(swatch, make("span", { dir: "auto" }, label), make("b", {}, counting.format(count)));
      return count ? row : null;
    }).filter((row) => row);
    byId("legend").replaceChildren(byId("legend").firstElementChild, ...rows, ...kinds);
  }

  // Patterns are drawn in source pixels: scaled so that they look alike on every scene.
  function patternScale() {
    return Math.max(scene.width, scene.height) / 900;
  }

  function drawMap() {
    plane.style.setProperty("--ratio", String(scene.width / scene.height));
    grid.setAttribute("viewBox", `0 0 ${scene.width} ${scene.height}`);
    const scale = patternScale();
    for (const id of ["hatch", "dots", "cross"]) {
      byId(id).setAttribute("patternTransform", `${id === "dots" ? "" : "rotate(45) "}scale(${scale})`);
    }
    if (scene.picture) picture.src = scene.picture;
    else picture.removeAttribute("src");
    picture.alt = `Quicklook of ${scene.name}`;
    rects = tiles.map((tile, i) => shape({
      class: `tile ${tile.status}`, x: tile.col_off, y: tile.row_off, width: tile.width, height: tile.height,
      "data-tile": i,
    }));
    // Opaque in a translucent group, so that overlapping tiles are not painted twice.
    const painted = document.createElementNS(SVG, "g");
    painted.setAttribute("class", "painted");
    tiles.forEach((tile, i) => {
      const colour = classes && classes.get(tile.caption);
      if (!colour) return;
      rects[i].classList.add("classed");
      rects[i].style.setProperty("--class", colour);
      painted.append(rects[i]);
    });
    rings = {};
    for (const name of ["pinned", "cursor"]) rings[name] = [shape({ class: "ring under" }), shape({ class: `ring ${name}` })];
    grid.replaceChildren(painted, ...rects.filter((rect) => rect.parentNode !== painted), ...rings.pinned, ...rings.cursor);
    ring("cursor", -1);
    ring("pinned", -1);
    setZoom(0);
  }

  function ring(name, i) {
    for (const rect of rings[name]) {
      rect.style.display = i < 0 ? "none" : "";
      if (i < 0) continue;
      for (const [key, value] of [["x", "col_off"], ["y", "row_off"], ["width", "width"], ["height", "height"]]) {
        rect.setAttribute(key, tiles[i][value]);
      }
    }
  }

  function drawList() {
    items = tiles.map((tile, i) => {
      const item = make("li", { role: "option", id: `tile-${i}`, "data-tile": i, "aria-selected": "false" });
      const text = make("span", { dir: "auto" }, words(tile));
      if (tile.caption === null) text.className = "without";
      item.append(make("span", {}, `r ${tile.row} · c ${tile.col}`), text,
        make("span", {}, tile.score === null ? "" : signed(tile.score, 2)));
      return item;
    });
    arrange();
  }

  function arrange() {
    const score = (i, missing) => (tiles[i].score === null ? missing : tiles[i].score);
    const by = {
      place: (a, b) => a - b,
      caption: (a, b) => (tiles[a].caption === null) - (tiles[b].caption === null)
        || byText.compare(words(tiles[a]), words(tiles[b])) || a - b,
      low: (a, b) => score(a, Infinity) - score(b, Infinity) || a - b,
      high: (a, b) => score(b, -Infinity) - score(a, -Infinity) || a - b,
    }[byId("order").value];
    order = tiles.map((_, i) => i).sort((a, b) => by(a, b) || 0);
    list.replaceChildren(...order.map((i) => items[i]));
  }

  // ---- filter

  function apply() {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    matches = tiles.map((tile) => {
      if (!shown.has(tile.status)) return false;
      const text = words(tile).toLowerCase();
      return wanted.every((word) => text.includes(word));
    });
    const count = matches.filter(Boolean).length;
    const filtered = wanted.length > 0 || count < tiles.length;
    grid.classList.toggle("filtered", filtered);
    for (const [i, match] of matches.entries()) {
      rects[i].classList.toggle("match", filtered && match);
      items[i].hidden = !match;
    }
    byId("none").hidden = count > 0;
    byId("count").textContent = filtered
      ? `${counting.format(count)} of ${counting.format(tiles.length)} tiles match`
      : `${counting.format(count)} tiles`;
    mark(wanted);
  }

  function mark(wanted) {
    if (!("highlights" in CSS)) return; // an older browser shows the matches without marking the words
    const ranges = [];
    if (wanted.length) {
      for (const [i, match] of matches.entries()) {
        if (!match) continue;
        const node = items[i].children[1].firstChild;
        const text = node.data.toLowerCase();
        if (text.length !== node.data.length) continue; // some letters change their length: positions would be off
        for (const word of wanted) {
          for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
            const range = new Range();
            range.setStart(node, at);
            range.setEnd(node, at + word.length);
            ranges.push(range);
          }
        }
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  // ---- one tile: walked to, hovered, pinned

  function walkTo(i, { say = true, reveal = true } = {}) {
    if (items[cursor]) items[cursor].classList.remove("at");
    cursor = i;
    ring("cursor", i);
    if (i < 0) {
      tip.hidden = true;
      list.removeAttribute("aria-activedescendant");
      return;
    }
    items[i].classList.add("at");
    list.setAttribute("aria-activedescendant", `tile-${i}`);
    if (reveal) {
      scrollTo(frame, rects[i]);
      scrollTo(list, items[i]);
    }
    point(i);
    if (say) byId("live").textContent = `${place(tiles[i])}: ${words(tiles[i])}`;
  }

  // Scrolls the box alone, where scrollIntoView would move the page as well.
  function scrollTo(box, target) {
    if (box.scrollHeight <= box.clientHeight + 1 && box.scrollWidth <= box.clientWidth + 1) return;
    const outer = box.getBoundingClientRect(), inner = target.getBoundingClientRect();
    if (inner.width === 0) return;
    if (inner.top < outer.top) box.scrollTop += inner.top - outer.top - 8;
    if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom + 8;
    if (inner.left < outer.left) box.scrollLeft += inner.left - outer.left - 8;
    if (inner.right > outer.right) box.scrollLeft += inner.right - outer.right + 8;
  }

  function point(i) {
    if (i < 0) {
      tip.hidden = true;
      return;
    }
    tip.children[0].textContent = place(tiles[i]);
    tip.children[1].textContent = words(tiles[i]);
    tip.hidden = false;
    const stage = tip.parentElement.getBoundingClientRect(), view = frame.getBoundingClientRect();
    const at = rects[i].getBoundingClientRect();
    const middle = (at.left + at.right) / 2 - stage.left;
    const left = Math.max(0, Math.min(middle - tip.offsetWidth / 2, stage.width - tip.offsetWidth));
    const above = at.top - tip.offsetHeight - 8 >= Math.max(view.top, 0);
    const top = above ? at.top - stage.top - tip.offsetHeight - 8 : at.bottom - stage.top + 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  }

  function pin(i) {
    if (items[pinned]) items[pinned].setAttribute("aria-selected", "false");
    pinned = i;
    ring("pinned", i);
    if (i >= 0) items[i].setAttribute("aria-selected", "true");
    showDetail();
  }

  function showDetail() {
    const tile = tiles[pinned];
    const caption = byId("caption");
    if (!tile) {
      byId("which").textContent = "No tile pinned";
      caption.textContent = "Click or tap a tile, or walk to it and press Enter.";
      caption.className = "without";
      describe(byId("about"), []);
      return;
    }
    byId("which").textContent = `Tile in ${place(tile)}`;
    caption.textContent = words(tile);
    caption.className = tile.caption === null ? "without" : "";
    describe(byId("about"), [
      ["Status", STATUS[tile.status]],
      classes ? ["Probability", percent(tile.score)]
        : ["Score", tile.score === null ? null : `${signed(tile.score, 4)} (log-probability; 0 is certain)`],
      ["Centre", tile.lat === null ? null : `${degrees(tile.lat, "NS")}, ${degrees(tile.lon, "EW")}`],
      ["Pixels", `rows ${tile.row_off} to ${tile.row_off + tile.height - 1}, columns ${tile.col_off} to ${tile.col_off + tile.width - 1}`],
      ["Without data", percent(tile.nodata_fraction)],
      ["Cloud", percent(tile.cloud_fraction)],
    ]);
  }

  // The tile under the pointer; where tiles overlap, the one whose centre is nearest.
  function tileAt(event) {
    const box = grid.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * scene.width;
    const y = (event.clientY - box.top) / box.height * scene.height;
    let found = -1, nearest = Infinity;
    for (const [i, t] of tiles.entries()) {
      if (x < t.col_off || y < t.row_off || x >= t.col_off + t.width || y >= t.row_off + t.height) continue;
      const distance = (x - t.col_off - t.width / 2) ** 2 + (y - t.row_off - t.height / 2) ** 2;
      if (distance < nearest) [found, nearest] = [i, distance];
    }
    return found;
  }

  // Many small tiles want thin lines, or lines are all there is to see.
  function weighLines() {
    if (!tiles.length) return;
    const side = tiles[0].width / scene.width * plane.clientWidth; // of a tile on the screen
    plane.style.setProperty("--lines", String(Math.max(0.14, Math.min(side / 100, 0.45))));
    plane.style.setProperty("--ring", `${Math.max(1.5, Math.min(side / 12, 3))}px`);
  }

  function setZoom(level) {
    const middle = [(frame.scrollLeft + frame.clientWidth / 2) / frame.scrollWidth,
      (frame.scrollTop + frame.clientHeight / 2) / frame.scrollHeight];
    zoom = Math.max(0, Math.min(level, ZOOMS.length - 1));
    plane.style.setProperty("--zoom", String(ZOOMS[zoom]));
    weighLines();
    frame.scrollLeft = middle[0] * frame.scrollWidth - frame.clientWidth / 2;
    frame.scrollTop = middle[1] * frame.scrollHeight - frame.clientHeight / 2;
    byId("closer").disabled = zoom === ZOOMS.length - 1;
    byId("farther").disabled = zoom === 0;
    if (cursor >= 0) {
      scrollTo(frame, rects[cursor]);
      point(cursor);
    } else tip.hidden = true;
  }

  // ---- events, one listener for all tiles

  grid.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") point(tileAt(event));
  });
  grid.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") point(frame.matches(":focus-visible") ? cursor : -1);
  });
  grid.addEventListener("click", (event) => {
    const i = tileAt(event);
    if (i < 0) return;
    walkTo(i, { reveal: false });
    pin(i);
    scrollTo(list, items[i]);
  });
  frame.addEventListener("scroll", () => { if (!tip.hidden) tip.hidden = true; }, { passive: true });
  frame.addEventListener("blur", () => { tip.hidden = true; });
  list.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (!item) return;
    walkTo(Number(item.dataset.tile));
    pin(cursor);
  });
  byId("closer").addEventListener("click", () => setZoom(zoom + 1));
  byId("farther").addEventListener("click", () => setZoom(zoom - 1));

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function neighbour(key) {
    if (cursor < 0) return pinned >= 0 ? pinned : Math.max(0, matches.indexOf(true));
    const [down, right] = STEPS[key];
    const next = places.get(`${tiles[cursor].row + down},${tiles[cursor].col + right}`);
    return next === undefined ? cursor : next;
  }

  function inList(step) {
    const visibleOnes = order.filter((i) => matches[i]);
    if (!visibleOnes.length) return cursor;
    const at = visibleOnes.indexOf(cursor);
    if (at < 0) return visibleOnes[step > 0 ? 0 : visibleOnes.length - 1];
    return visibleOnes[Math.max(0, Math.min(at + step, visibleOnes.length - 1))];
  }

  function onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !tiles.length) return;
    const onList = event.currentTarget === list;
    const listSteps = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (onList && key in listSteps) walkTo(inList(listSteps[key]));
    else if (!onList && key in STEPS) walkTo(neighbour(key));
    else if (key === "n") walkTo(inList(1));
    else if (key === "p") walkTo(inList(-1));
    else if ((key === "Enter" || key === " ") && cursor >= 0) pin(cursor);
    else if (key === "+" || key === "=") setZoom(zoom + 1);
    else if (key === "-") setZoom(zoom - 1);
    else return;
    event.preventDefault();
  }
  frame.addEventListener("keydown", onKey);
  list.addEventListener("keydown", onKey);

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      filter.focus();
      filter.select();
    } else if (event.key === "Escape") {
      if (filter.value) {
        filter.value = "";
        apply();
      } else {
        walkTo(-1);
        pin(-1);
      }
    }
  });
  filter.addEventListener("input", apply);
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      list.focus();
      walkTo(inList(1));
    }
  });
  byId("legend").addEventListener("change", (event) => {
    if (event.target.checked) shown.add(event.target.value);
    else shown.delete(event.target.value);
    apply();
  });
  byId("order").addEventListener("change", arrange);

  window.addEventListener("resize", weighLines);

  const select = byId("scene");
  if (classes) {
    document.querySelector("label[for=filter]").textContent = "Filter classes";
    document.querySelector("#order option[value=caption]").textContent = "by class";
    document.querySelector("footer").textContent = document.querySelector("footer").textContent.replace("Captions are written", "Classes are chosen");
  }
  select.append(...data.scenes.map((entry, i) => make("option", { value: i }, entry.name)));
  select.addEventListener("change", () => show(Number(select.value)));
  byId("chooser").hidden = data.scenes.length < 2;
  show(0);
})();
