// Runs model.onnx on a photo, in the browser. The photo is sent nowhere.
"use strict";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const INSTALL = "run: npm install --no-save --prefix FOLDER onnxruntime-web@1";
const element = (id) => document.getElementById(id);
const stop = (stream) => stream?.getTracks().forEach((track) => track.stop());
let ort, session, model, result, latest = 0;

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

/** A promise's value; if it fails, an Error with this text and the reason. */
function orSay(text, promise) {
  return promise.catch((error) => Promise.reject(new Error(`${text} (${error.message || error})`)));
}

async function download(path) {
  const response = await orSay(`${path} cannot be loaded`, fetch(path, { cache: "no-cache" }));
  if (!response.ok) throw new Error(`${path} is missing: write this folder again with export.py --page`);
  return response;
}

async function load() {
  if (location.protocol === "file:") throw new Error("This page needs a web server: python -m http.server -d FOLDER");
  model = await (await download("model.json")).json();
  const source = [model.experiment, model.dataset].filter(Boolean).join(" on ");
  element("model").textContent = `${source || "Model"}, ${model.classes.length} classes. ` + element("model").textContent;
  ort = await orSay(`onnxruntime-web cannot be loaded; ${INSTALL}; or let the server send .mjs as text/javascript`, import(RUNTIME));
  const bytes = new Uint8Array(await (await download("model.onnx")).arrayBuffer());
  session = await orSay("The model cannot be started", ort.InferenceSession.create(bytes));
}

/** Runs an action that replaces what is shown. Of several, only the latest one shows its result or error. */
async function start(action) {
  const run = ++latest;
  const current = (promise) => promise.then((value) => (run === latest ? value : Promise.reject(new Error("outdated"))));
  clear(session ? "" : "Loading the model …");
  await action(current).catch((error) => run === latest && clear(error.message, true));
}

/** Ends the camera, empties the stage and says something. */
function clear(text, isError) {
  stop(element("video").srcObject);
  element("video").srcObject = null;
  element("live").hidden = element("view").hidden = true;
  element("hint").hidden = false;
  element("camera").textContent = "Camera";
  show(null);
  say(text, isError);
}

/** Draws an image onto a new canvas, as a browser that fails to draw leaves the canvas unusable; returns its RGB values. */
function draw(image) {
  const { width, height } = image, canvas = Object.assign(document.createElement("canvas"), { id: "photo", width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let rgba = [];
  try {
    context.fillRect(0, 0, width, height); // black
    context.drawImage(image, 0, 0);
    rgba = context.getImageData(0, 0, width, height).data;
  } catch {} // some browsers throw, others read transparent pixels
  if (!rgba[3] || !rgba[rgba.length - 1]) throw new Error(`${width} × ${height} pixels are too large for this browser`);
  element("photo").replaceWith(canvas);
  element("view").style.setProperty("--ratio", width / height);
  [element("hint").hidden, element("view").hidden] = [true, false];
  const rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < rgba.length; from++) if (from % 4 < 3) rgb[to++] = rgba[from];
  return rgb;
}

/** Segments a photo, a promise of an ImageBitmap, and shows the result. */
async function segment(name, decoding, current) {
  const image = await current(decoding), { width, height } = image, rgb = draw(image);
  await current(loaded);
  say("Segmenting …");
  await current(new Promise((done) => setTimeout(done, 50))); // so that the browser paints before it is busy
  const began = performance.now(), photo = new ort.Tensor("uint8", rgb, [height, width, 3]);
  const running = orSay("The model failed, perhaps for lack of memory: try a smaller photo", session.run({ photo }));
  show({ name, labels: (await current(running)).mask.data, width, height });
  say(`${width} × ${height} pixels, ${((performance.now() - began) / 1000).toFixed(1)} s.`);
}

/** Shows a mask over the photo, with the share of each class; null clears both. */
function show(mask) {
  result = mask;
  element("save").disabled = !mask;
  element("results").hidden = !mask;
  const canvas = element("overlay"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [mask ? mask.width : 1, mask ? mask.height : 1];
  if (!mask) return;
  const pixels = context.createImageData(mask.width, mask.height);
  const colours = model.classes.map((name, label) => (label === model.background ? [0, 0, 0, 0] : [...model.overlay_colours[label], 255]));
  const packed = new Uint32Array(new Uint8Array(colours.flat()).buffer), target = new Uint32Array(pixels.data.buffer);
  const counts = new Array(colours.length).fill(0);
  mask.labels.forEach((label, index) => (counts[label]++, (target[index] = packed[label])));
  context.putImageData(pixels, 0, 0);
  const present = [...counts.keys()].filter((label) => counts[label]).sort((a, b) => counts[b] - counts[a]);
  element("legend").replaceChildren(...present.map((label) => {
    const share = `${((100 * counts[label]) / mask.labels.length).toFixed(1)} %`;
    const [row, swatch, text, number, bar] = ["li", "i", "b", "span", "div"].map((tag) => document.createElement(tag));
    swatch.style.background = `rgba(${colours[label]})`;
    bar.style.background = `linear-gradient(90deg, var(--main) ${share.replace(" ", "")}, var(--line) 0)`;
    [text.textContent, number.textContent] = [model.classes[label], share];
    row.append(swatch, text, number, bar);
    return row;
  }));
}

/** A chunk of a PNG: length, type, data and CRC-32. */
function chunk(type, data) {
  const bytes = new Uint8Array(data.length + 12), view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  let crc = ~0;
  for (const byte of bytes.subarray(4, -4)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 && 0xedb88320);
  }
  view.setUint32(data.length + 8, ~crc);
  return bytes;
}

/** The mask as predict.py writes it: a PNG with VOC's palette, whose values are the class indices. */
async function png({ labels, width, height }) {
  const header = new Uint8Array(13), rows = new Uint8Array((width + 1) * height); // each row starts with its filter, 0
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set([8, 3], 8); // 8 bits per pixel, palette
  for (let y = 0; y < height; y++) rows.set(labels.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const stream = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  const chunks = [["IHDR", header], ["PLTE", new Uint8Array(model.palette.flat())], ["IDAT", data], ["IEND", []]];
  const signature = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  return new Blob([signature, ...chunks.map((parts) => chunk(...parts))], { type: "image/png" });
}

async function save() {
  const link = document.createElement("a");
  link.download = `${result.name}_mask.png`;
  link.href = URL.createObjectURL(await png(result));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function open(file) {
  if (!file) return;
  const decoded = createImageBitmap(file, { colorSpaceConversion: "none" }); // predict.py, too, ignores colour profiles
  const decoding = orSay(`${file.name} cannot be read as a photo: save it as JPEG or PNG`, decoded);
  start((current) => segment(file.name.replace(/\.[^.]*$/, ""), decoding, current));
}

async function camera(current) {
  if (!navigator.mediaDevices) throw new Error("The camera needs https, or localhost");
  const video = element("video"), wish = { video: { facingMode: "environment" } };
  const stream = await orSay("The camera cannot be used", navigator.mediaDevices.getUserMedia(wish));
  video.srcObject = await current(Promise.resolve(stream)).catch((error) => stop(stream) || Promise.reject(error));
  await current(video.play());
  [element("hint").hidden, element("live").hidden] = [true, false];
  element("camera").textContent = "Stop";
}

element("file").onchange = ({ target }) => {
  open(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
element("camera").onclick = () => start(element("video").srcObject ? async () => {} : camera);
element("shoot").onclick = () => {
  const frame = orSay("The camera gives no picture", createImageBitmap(element("video")));
  start((current) => segment("camera", frame, current));
};
element("save").onclick = () => save().catch((error) => say(error.message, true));
element("opacity").oninput = () => (element("overlay").style.opacity = element("opacity").value / 100);
element("opacity").oninput();
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => event.preventDefault() || open(event.dataTransfer.files[0]);
const loaded = load();
start((current) => current(loaded).then(() => say("Ready.")));
