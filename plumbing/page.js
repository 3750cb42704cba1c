// What a reader can change on a page of plumbing/page.py. All numbers and pictures are computed
// beforehand: this file looks them up. A section that the data lacks is left out.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const sheet = new Image();
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const at = id => document.getElementById(id);
const signed = x => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);
const dB = x => `<b>${x.toFixed(2)} dB</b>`;

// The state is the page's address: #image=2&token=5 is a link to that token.
const state = {image: data.change ? data.change.open : 0, token: 1, donor: 0, model: 0, k: 4,
               look: 8, map: 0, cell: -1};
for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
  if (name in state && Number.isInteger(+value)) state[name] = +value;
function keep() {
  history.replaceState(null, "", "#" + new URLSearchParams(state));
}

// --- elements

function element(kind, parent, words = "", attributes = {}) {
  const made = document.createElement(kind);
  made.innerHTML = words;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

function draw(canvas, number, mode = "copy") {
  const {side, columns} = data.sheet, pen = canvas.getContext("2d");
  pen.globalCompositeOperation = mode;
  pen.drawImage(sheet, number % columns * side, Math.floor(number / columns) * side, side, side,
                0, 0, side, side);
}

function picture(parent, number) {
  const {side} = data.sheet;
  const canvas = element("canvas", parent, "", {width: side, height: side});
  draw(canvas, number);
  return canvas;
}

// figures: [tile number, caption, class] of each; -> their canvases
function pictures(id, figures) {
  at(id).replaceChildren();
  return figures.map(([number, caption, kind = ""]) => {
    const figure = element("figure", at(id), "", {class: kind});
    const canvas = picture(figure, number);
    element("figcaption", figure, caption);
    return canvas;
  });
}

// Buttons, one of which is pressed: tiles or words.
function choices(id, labels, pressed, choose, what) {
  at(id).replaceChildren();
  labels.forEach((label, n) => {
    const button = element("button", at(id), typeof label === "string" ? label : "",
      {type: "button", "aria-pressed": n === pressed, "aria-label": `${what} ${n + 1}`});
    if (typeof label === "number") picture(button, label);
    else button.removeAttribute("aria-label");
    button.onclick = () => { choose(n); at(id).children[n].focus(); };
  });
}

// A chip for each token. Tab reaches the chosen one, arrows the others.
function chips(id, count, on) {
  for (let i = 1; i <= count; i++) {
    const chip = element("button", at(id), `${i}<small></small><i></i>`, {type: "button"});
    chip.onclick = () => on(i, "click");
    chip.onfocus = chip.onmouseenter = () => on(i, "look");
    chip.onkeydown = event => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      at(id).children[(i - 1 + step + count) % count].focus();
    };
  }
}
const text = (chip, words) => { chip.querySelector("small").textContent = words; };

// --- change one token

let turning = 0;  // the number of the change that is being shown

function showChange(moves) {
  const {change} = data, model = change.models[state.model], place = state.token - 1;
  const ids = model.ids[state.image], donors = model.swaps[state.image][place];
  const swap = donors[state.donor % donors.length], recon = model.db[state.image];
  const whole = model.recon[state.image];
  choices("images", change.images, state.image, n => { state.image = n; showAll(); }, "image");
  choices("models", change.models.length < 2 ? [] : change.models.map(one => one.name), state.model,
          n => { state.model = n; state.donor = 0; showChange(true); keep(); }, "tokenizer");
  const later = swap.later.map((id, n) => id === ids[place + 1 + n] ? 0 : place + 2 + n);
  const changed = later.filter(i => i);
  const {side} = data.sheet, small = `<canvas id="donor" width="${side}" height="${side}"></canvas>`;
  const canvases = pictures("change-pictures", [
    [change.images[state.image], "the image"],
    [whole, `its ${ids.length} tokens decoded<br>${dB(recon)}`],
    [swap.broken, `token ${state.token} of ${small} swapped in<br>
                   ${dB(swap.brokenDb)} (${signed(swap.brokenDb - recon)})`, "lost"],
    [swap.answered, `later tokens re-encoded<br>${dB(swap.answeredDb)}
                     (${signed(swap.answeredDb - swap.brokenDb)})`, "won"]]);
  [...at("change-chips").children].forEach((chip, n) => {
    chip.className = n === place ? "chosen" : "";
    chip.tabIndex = n === place ? 0 : -1;
    text(chip, n === place ? swap.code : ids[n]);
  });
  at("change-chips").classList.toggle("moving", moves);
  const mine = ++turning;
  function turn(n) {  // the first n of the changed chips have turned
    if (mine !== turning) return;
    changed.slice(0, n).forEach(i => {
      const chip = at("change-chips").children[i - 1];
      chip.className = "changed";
      text(chip, swap.later[i - place - 2]);
    });
    at("change-said").innerHTML = said(n);
    draw(canvases[3], n < changed.length ? swap.broken : swap.answered);
    if (n < changed.length) setTimeout(turn, 90, n + 1);
  }
  const swapped = swap.code === ids[place] ? `The donor has the same code, so nothing changes. `
    : `Token ${state.token}: code ${ids[place]} becomes ${swap.code}. `;
  const said = n => `${swapped}PSNR lost: <b id="lost">${(recon - swap.brokenDb).toFixed(2)}</b> dB.
    Later tokens that changed: <b id="changed">${n}</b> of ${later.length}.
    Recovered: <b id="recovered">${(swap.answeredDb - swap.brokenDb).toFixed(2)}</b> dB.` +
    (model.name.startsWith("titok") ? ` ${model.name} chooses all tokens at once: none reads
    another, so none can change.` : "");
  draw(at("donor"), swap.donor);
  turn(moves && !still ? 0 : changed.length);
}

// --- the first k tokens

function showPrefix() {
  const {prefix} = data, tiles = prefix.tiles[state.image], k = state.k;
  at("prefix-slider").max = tiles.length;
  at("prefix-slider").value = k;
  at("prefix-k").textContent = `${k} of ${tiles.length}`;
  const canvases = pictures("prefix-pictures", [
    [data.change.images[state.image], "the image"],
    [tiles[k - 1], `the first ${k === 1 ? "token" : k + " tokens"}<br>
                    ${dB(prefix.db[state.image][k - 1])}`],
    [tiles[k - 1], k === 1 ? "token 1, from black" : `what token ${k} changed`]]);
  if (k > 1) draw(canvases[2], tiles[k - 2], "difference");
  canvases[2].style.filter = k > 1 ? "brightness(3)" : "";
  const bits = k * prefix.bits;
  at("prefix-said").innerHTML = `<b id="bits">${+bits.toFixed(1)}</b> bits at
    ${+prefix.bits.toFixed(2)} a token, of ${prefix.raw.toLocaleString("en")} in the pixels. ` +
    (prefix.spent ? `Under the AR model: <b id="spent">${prefix.spent[state.image][k - 1]
    .toFixed(1)}</b> bits.` : "") + ` ${+prefix.bits.toFixed(2)} bits a token is guessing.`;
}

// --- where each expert looks

function showLook() {
  const {look} = data, i = state.look, N = look.side * look.side;
  const [, canvas] = pictures("look-pictures", [
    [data.change.images[state.image], "the image"],
    [data.change.images[state.image], `where expert ${i} looks`]]);
  const bytes = atob(look.maps[state.image]), pen = canvas.getContext("2d");
  const patch = data.sheet.side / look.side;
  pen.globalCompositeOperation = "source-over";
  for (let n = 0; n < N; n++) {
    pen.fillStyle = `rgb(0 0 0 / ${.85 * (1 - bytes.charCodeAt((i - 1) * N + n) / 255)})`;
    pen.fillRect(n % look.side * patch, Math.floor(n / look.side) * patch, patch, patch);
  }
  const weights = look.weights[state.image][i - 1], most = Math.max(...weights, 1e-9);
  [...at("look-chips").children].forEach((chip, n) => {
    chip.className = n === i - 1 ? "chosen" : "";
    chip.tabIndex = n === i - 1 ? 0 : -1;
    text(chip, n < i - 1 ? Math.round(100 * weights[n]) + "%" : "\u00a0");
    chip.querySelector("i").style.height = n < i - 1 ? 100 * weights[n] / most + "%" : 0;
  });
  const onPatches = look.patches[state.image][i - 1], onTokens = weights.reduce((a, b) => a + b, 0);
  const percent = x => Math.round(100 * x) + "%";
  at("look-said").innerHTML = `Expert ${i} gives <b id="on-patches">${percent(onPatches)}</b> of its
    attention to the image, <b id="on-tokens">${percent(onTokens)}</b> to the ${i - 1} tokens before
    it, ${percent(Math.max(0, 1 - onPatches - onTokens))} to its own query.`;
}

// --- write it yourself

function showWrite(path = []) {
  const {write} = data, box = at("write-choices");
  let node = write, bits = 0;
  for (const n of path) { node = node.next[n]; bits -= Math.log2(node.p); }
  box.replaceChildren();
  for (const [n, next] of (node.next || []).entries()) {
    const button = element("button", box, "", {type: "button", class: "choice"});
    picture(button, next.tile);
    element("span", button, `code ${next.id}<br>${(100 * next.p).toPrecision(2)}%,
                             ${(-Math.log2(next.p)).toFixed(1)} bits`);
    button.onclick = () => { showWrite([...path, n]); (box.children[0] || box).focus?.(); };
  }
  if (!node.next) {
    for (const [tile, words] of [[node.tile, "your tokens"], [node.last, "finished by the model"]]) {
      const figure = element("figure", box);
      picture(figure, tile);
      element("figcaption", figure, words);
    }
  }
  const guess = +(write.bits * path.length).toFixed(1);
  at("write-said").innerHTML = (path.length ? `You chose ${path.length} of ${write.length} tokens:
    <b id="written">${bits.toFixed(1)}</b> bits; guessing costs ${guess}.`
    : `Choose token 1 of ${write.length}.`) + ` ${+write.bits.toFixed(2)} bits a token is guessing.`;
  at("write-again").onclick = () => showWrite();
}

// --- fine and coarse cells

function showCells() {
  const {cells} = data, n = cells.side, shown = cells.images[state.image];
  const flipped = state.map === 0 && state.cell >= 0;
  const now = flipped ? shown.flips[state.cell] : shown.maps[state.map];
  choices("images", cells.images.map(one => one.tile), state.image,
          i => { state.image = i; state.cell = -1; showAll(); }, "image");
  choices("maps", cells.names, state.map, i => { state.map = i; state.cell = -1; showAll(); });
  const [image, , error] = pictures("cells-pictures", [
    [shown.tile, "red frames are fine cells"],
    [now.tile, `decoded from <b id="codes">${now.codes}</b> codes<br>${dB(now.db)}`],
    [now.tile, "its error, three times as bright"]]);
  draw(error, shown.tile, "difference");
  error.style.filter = "brightness(3)";
  const frame = element("div", image.parentNode, "", {class: "cells"});
  image.before(frame);
  frame.append(image);
  const grid = element("div", frame, "", {style: `grid-template-columns: repeat(${n}, 1fr)`});
  [...now.map].forEach((fine, i) => {
    const where = `row ${Math.floor(i / n) + 1}, column ${i % n + 1}: `;
    const cell = element("button", grid, "", {type: "button", class: fine === "1" ? "fine" : "",
      "aria-label": where + (fine === "1" ? "fine" : "coarse")});
    cell.tabIndex = i === Math.max(state.cell, 0) ? 0 : -1;
    cell.onclick = () => {
      state.cell = flipped && state.cell === i ? -1 : i;
      state.map = 0;  // single cells are flipped in the image's own map
      showAll();
      document.querySelectorAll(".cells button")[i].focus();
    };
    cell.onkeydown = event => {
      const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: n, ArrowUp: -n}[event.key];
      if (!step) return;
      event.preventDefault();
      grid.children[(i + step + n * n) % (n * n)].focus();
    };
  });
  const own = shown.maps[0];
  at("cells-said").innerHTML = (flipped ? `Row ${Math.floor(state.cell / n) + 1}, column
    ${state.cell % n + 1} is now ${now.map[state.cell] === "1" ? "fine" : "coarse"}. `
    : `Map: ${cells.names[state.map]}. `) + `Against the image's own map:
    <b id="more">${signed(now.codes - own.codes).replace(".00", "")}</b> codes,
    <b id="gain">${signed(now.db - own.db)}</b> dB.`;
}

// --- start

function showAll() {
  if (data.change) showChange(false);
  if (data.prefix) showPrefix();
  if (data.look) showLook();
  if (data.cells) showCells();
  keep();
}

sheet.onload = () => {
  const bound = (x, low, high) => Math.min(Math.max(x, low), high);
  if (data.change) {
    const L = data.change.models[0].ids[0].length;
    state.image = bound(state.image, 0, data.change.images.length - 1);
    state.model = bound(state.model, 0, data.change.models.length - 1);
    state.donor = Math.max(state.donor, 0);
    for (const name of ["token", "k", "look"]) state[name] = bound(state[name], 1, L);
    chips("change-chips", L, (i, how) => {
      if (how !== "click") return;
      state.donor = i === state.token ? state.donor + 1 : 0;
      state.token = i;
      showChange(true);
      keep();
    });
    if (data.look) chips("look-chips", L, i => { state.look = i; showLook(); keep(); });
    if (data.prefix) at("prefix-slider").oninput = event => {
      state.k = +event.target.value;
      showPrefix();
      keep();
    };
  }
  if (data.cells) {
    state.image = bound(state.image, 0, data.cells.images.length - 1);
    state.map = bound(state.map, 0, data.cells.names.length - 1);
    state.cell = bound(state.cell, -1, data.cells.side ** 2 - 1);
  }
  showAll();
  if (data.write) showWrite();
  document.documentElement.dataset.ready = "yes";
};
sheet.src = at("tiles").textContent;
