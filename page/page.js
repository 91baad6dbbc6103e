// Runs model.onnx on a photo, in the browser. The photo is sent nowhere.
"use strict";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const INSTALL = "run: npm install --no-save --prefix FOLDER onnxruntime-web@1";
const element = (id) => document.getElementById(id);
let ort, session, model, mask, name = "photo";

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

/** A promise's value; if it fails, an Error with this text and the reason. */
function orSay(text, promise) {
  return promise.catch((error) => Promise.reject(new Error(`${text} (${error.message || error})`)));
}

async function download(path) {
  const response = await orSay(`${path} cannot be loaded`, fetch(path));
  if (!response.ok) throw new Error(`${path} is missing: write this folder again with export.py --page`);
  return response;
}

async function load() {
  if (location.protocol === "file:") throw new Error("This page needs a web server: python -m http.server -d FOLDER");
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly: use a current one, or allow it");
  model = await (await download("model.json")).json();
  const source = [model.experiment, model.dataset].filter(Boolean).join(" on ");
  element("model").textContent = `${source || "Model"}, ${model.classes.length} classes. ` + element("model").textContent;
  ort = await orSay(`onnxruntime-web is missing; ${INSTALL}`, import(RUNTIME));
  const bytes = new Uint8Array(await (await download("model.onnx")).arrayBuffer());
  session = await orSay("The model cannot be started", ort.InferenceSession.create(bytes));
  say("Ready.");
}

/** Draws an image of any source upright, segments it and shows the result. */
async function segment(source, width, height) {
  await loaded;
  const canvas = element("photo"), context = canvas.getContext("2d", { willReadFrequently: true });
  [canvas.width, canvas.height] = [width, height];
  context.drawImage(source, 0, 0, width, height);
  element("hint").hidden = true;
  element("view").hidden = false;
  element("view").style.setProperty("--ratio", width / height);
  show(null);
  say("Segmenting …");
  await new Promise((done) => setTimeout(done, 50)); // so that the browser paints before it is busy
  const start = performance.now(), rgba = context.getImageData(0, 0, width, height).data;
  const rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < rgba.length; from++) if (from % 4 < 3) rgb[to++] = rgba[from];
  const photo = new ort.Tensor("uint8", rgb, [height, width, 3]);
  const outputs = await orSay("The model failed, perhaps for lack of memory: try a smaller photo", session.run({ photo }));
  show({ labels: outputs.mask.data, width, height });
  say(`${width} × ${height} pixels, ${((performance.now() - start) / 1000).toFixed(1)} s.`);
}

/** Shows a mask over the photo, with the share of each class; null clears both. */
function show(result) {
  mask = result;
  element("save").disabled = !mask;
  element("results").hidden = !mask;
  const canvas = element("overlay"), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [mask ? mask.width : 1, mask ? mask.height : 1];
  if (!mask) return;
  const pixels = context.createImageData(mask.width, mask.height);
  const colours = model.classes.map((name, label) => (name === "background" ? [0, 0, 0, 0] : [...model.overlay_colours[label], 255]));
  const packed = new Uint32Array(new Uint8Array(colours.flat()).buffer), target = new Uint32Array(pixels.data.buffer);
  const counts = new Array(colours.length).fill(0);
  mask.labels.forEach((label, index) => {
    counts[label]++;
    target[index] = packed[label];
  });
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
  link.href = URL.createObjectURL(await png(mask));
  link.download = `${name}_mask.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function open(file) {
  stopCamera();
  name = file.name.replace(/\.[^.]*$/, "");
  const decoded = createImageBitmap(file, { colorSpaceConversion: "none" }); // predict.py, too, ignores colour profiles
  const image = await orSay(`${file.name} cannot be read as a photo`, decoded);
  await segment(image, image.width, image.height);
}

function stopCamera() {
  const video = element("video");
  if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = true;
  element("camera").textContent = "Camera";
}

/** Starts the camera; the next call takes a photo with it. */
async function camera() {
  const video = element("video");
  if (video.srcObject) {
    const frame = await createImageBitmap(video);
    stopCamera();
    name = "camera";
    return segment(frame, frame.width, frame.height);
  }
  if (!navigator.mediaDevices) throw new Error("The camera needs https, or localhost");
  const wish = { video: { facingMode: "environment" } };
  video.srcObject = await orSay("The camera cannot be used", navigator.mediaDevices.getUserMedia(wish));
  await video.play();
  element("hint").hidden = element("view").hidden = true;
  video.hidden = false;
  element("camera").textContent = "Take photo";
}

/** An event handler that shows what an async function throws. */
const handler = (action) => (event) => action(event)?.catch((error) => say(error.message, true));

element("file").onchange = handler(({ target }) => target.files[0] && open(target.files[0]));
element("camera").onclick = handler(camera);
element("save").onclick = handler(save);
element("opacity").oninput = () => (element("overlay").style.opacity = element("opacity").value / 100);
element("opacity").oninput();
element("stage").ondragover = (event) => event.preventDefault();
element("stage").ondrop = handler((event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) return open(file);
});
const loaded = load();
handler(() => loaded)();
