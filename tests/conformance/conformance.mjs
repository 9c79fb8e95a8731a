// Runs golden files on a WebAssembly module of the engine: node conformance.mjs MODULE.wasm FILE... (README.md)
//
// It speaks to the module's C face directly, one instance for each case, as conformance.c does to a library.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";

const ARRAYS = { 1: Float32Array, 2: Int8Array, 3: Uint8Array, 4: Int32Array };
const OK = 0;
const GUARD = 64;
const CANARY = 0xa5;
const MESSAGE_BYTES = 256;

let failures = 0;
let cases = 0;
let runs = 0;

function fail(name, what, got, expected) {
  failures += 1;
  if (failures <= 20) console.log(`${name}: ${what}: got ${got}, expected ${expected}`);
}

class Reader {
  constructor(bytes) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }
  take(size) {
    const data = new Uint8Array(this.view.buffer, this.view.byteOffset + this.at, size).slice();
    this.at += size;
    return data;
  }
  u8() { return this.view.getUint8(this.at++); }
  u16() { return this.view.getUint16((this.at += 2) - 2, true); }
  u32() { return this.view.getUint32((this.at += 4) - 4, true); }
  u64() { return this.view.getBigUint64((this.at += 8) - 8, true); }
  f32() { return this.view.getFloat32((this.at += 4) - 4, true); }
  result() {
    const [dtype, tolerance, size] = [this.u8(), this.f32(), this.u32()];
    return { dtype, tolerance, expected: this.take(size) };
  }
}

function compare(name, what, { dtype, tolerance, expected }, actual) {
  if (actual.length !== expected.length) return fail(name, what, `${actual.length} bytes`, expected.length);
  const [got, wanted] = [actual, expected].map((bytes) => new ARRAYS[dtype](bytes.slice().buffer));
  let largest = 1;
  for (const value of wanted) if (Number.isFinite(value)) largest = Math.max(largest, Math.abs(value));
  for (let i = 0; i < wanted.length; ++i) {
    if (Object.is(got[i], wanted[i]) || (Number.isNaN(got[i]) && Number.isNaN(wanted[i]))) continue;
    if (tolerance > 0 && Math.abs(got[i] - wanted[i]) <= tolerance * largest) continue;
    return fail(name, `${what}, element ${i}`, got[i], wanted[i]);
  }
}

// One instance of the module, its memory handed out from the start.
class Host {
  constructor(module) {
    this.c = new WebAssembly.Instance(module, {}).exports;
    this.next = this.c.__heap_base.value;
    this.message = this.reserve(MESSAGE_BYTES);
    this.result = this.reserve(64);
  }
  reserve(size) {
    const start = Math.ceil(this.next / 64) * 64;
    this.next = start + size;
    const missing = this.next - this.c.memory.buffer.byteLength;
    if (missing > 0) this.c.memory.grow(Math.ceil(missing / 65536));
    return start;
  }
  place(data) {
    const address = this.reserve(data.length);
    this.bytes(address, data.length).set(data);
    return address;
  }
  bytes(address, size) { return new Uint8Array(this.c.memory.buffer, address, size); }
  get view() { return new DataView(this.c.memory.buffer); }
  u32(address) { return this.view.getUint32(address, true); }
}

function open(host, artifact) {
  const { c, message, result } = host;
  const bytes = host.place(artifact);
  let status = c.evensong_memory_needed(bytes, artifact.length, 0, result, message, MESSAGE_BYTES);
  if (status !== OK) return { status };
  const needed = host.u32(result);
  const block = host.reserve(needed + 1);
  host.bytes(block, needed + 1).fill(CANARY);
  status = c.evensong_open_in(block, needed, 0, bytes, artifact.length, 0, result, message, MESSAGE_BYTES);
  return { status, engine: host.u32(result), end: block + needed };
}

function runOnce(host, engine, r, name) {
  const { c, message } = host;
  const [program, batch, learningRate] = [r.u32(), r.u32(), r.f32()];
  const [step, seed, wanted] = [r.u64(), r.u64(), r.u32()];
  const inputs = Array.from({ length: r.u8() }, () => r.take(r.u32()));
  const sizes = Array.from({ length: c.evensong_port_count(engine, program, 1) }, (_, i) =>
    c.evensong_port_bytes(engine, program, 1, i, batch),
  );
  const given = inputs.map((data) => [host.place(data), data.length]);
  const guarded = sizes.map((size) => [host.place(new Uint8Array(size + 2 * GUARD).fill(CANARY)) + GUARD, size]);
  const [inputsAt, outputsAt] = [given, guarded].map((list) => {
    const at = host.reserve(8 * list.length);
    list.flat().forEach((word, i) => host.view.setUint32(at + 4 * i, word, true));
    return at;
  });
  const options = host.reserve(24);
  host.view.setFloat32(options, learningRate, true);
  host.view.setUint32(options + 4, 0, true);
  host.view.setBigUint64(options + 8, step, true);
  host.view.setBigUint64(options + 16, seed, true);
  const status = c.evensong_run(
    engine, program, batch, inputsAt, given.length, outputsAt, guarded.length, options, message, MESSAGE_BYTES,
  );
  runs += 1;
  if (status !== wanted) fail(name, "status of run", status, wanted);
  const results = Array.from({ length: r.u8() }, () => r.result());
  results.forEach((result, i) => {
    if (status === OK) compare(name, `output ${i}`, result, host.bytes(...guarded[i]));
  });
  for (const [address, size] of guarded) {
    const around = [...host.bytes(address - GUARD, GUARD), ...host.bytes(address + size, GUARD)];
    if (around.some((byte) => byte !== CANARY)) fail(name, "bytes around an output", "others", CANARY);
  }
}

function runCase(module, r) {
  const host = new Host(module);
  const name = new TextDecoder().decode(r.take(r.u16()));
  cases += 1;
  const wanted = r.u32();
  const { status, engine, end } = open(host, r.take(r.u32()));
  if (status !== wanted) fail(name, "status of opening", status, wanted);
  if (status !== OK || wanted !== OK) {
    if (status !== wanted) throw new Error(`${name}: cannot go on`);
    r.take(4); // neither runs nor places
    return;
  }
  for (let left = r.u16(); left > 0; --left) runOnce(host, engine, r, name);
  const regions = { 1: host.c.evensong_state(engine, host.result), 2: host.c.evensong_slots(engine, host.result) };
  for (let left = r.u16(); left > 0; --left) {
    const [region, offset] = [r.u8(), Number(r.u64())];
    const result = r.result();
    compare(name, `region ${region} at ${offset}`, result, host.bytes(regions[region] + offset, result.expected.length));
  }
  if (host.bytes(end, 1)[0] !== CANARY) fail(name, "byte behind the memory", host.bytes(end, 1)[0], CANARY);
}

const [path, ...files] = process.argv.slice(2);
const module = await WebAssembly.compile(await readFile(path));
if (WebAssembly.Module.imports(module).length) fail(path, "imports", WebAssembly.Module.imports(module).length, 0);
for (const file of files) {
  const r = new Reader(await readFile(file));
  if (new TextDecoder().decode(r.take(4)) !== "EVGC" || r.u32() !== 1) throw new Error(`${file} is no golden file`);
  for (let left = r.u32(); left > 0; --left) runCase(module, r);
  if (r.at !== r.view.byteLength) throw new Error(`${file}: bytes are left over`);
}
console.log(`${basename(path)}: ${cases} cases, ${runs} runs, ${failures} failures`);
process.exitCode = failures || !cases ? 1 : 0;
