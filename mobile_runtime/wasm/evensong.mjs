/**
 * The evensong engine in WebAssembly: load an artifact, predict, train, evaluate. Works in browsers and in Node, with
 * the same artifacts and the same results as everywhere else (docs/targets.md, "WebAssembly").
 *
 *     import { Engine } from "./evensong.mjs";
 *     const engine = await Engine.compile({ simd128: fetch("evensong.wasm"), relaxed: fetch("evensong-relaxed.wasm") });
 *     const session = await engine.load(artifactBytes);
 *     const { data, shape } = session.predict(images);              // Float32Array, [examples, classes]
 *     const { loss } = session.trainStep(images, labels, { learningRate: 0.1 });
 *
 * Each session is a WebAssembly instance of its own: it holds the artifact, what that declares, and one buffer for every
 * port, and it is freed with the session object. Nothing here is safe to use from two threads at once.
 *
 * @typedef {Float32Array | Int8Array | Uint8Array | Int32Array} Values
 * @typedef {"float32" | "int8" | "uint8" | "int32"} DType
 * @typedef {{ data: Values, shape: number[] }} Tensor row-major
 * @typedef {Values | Uint8ClampedArray | number[] | Tensor} Input
 * @typedef {{ name: string, dtype: DType, shape: number[], batched: boolean }} Port `shape` is that of one example where
 *   `batched`
 * @typedef {{ name: string, maxBatch: number, inputs: Port[], outputs: Port[] }} Program
 * @typedef {{ dtype: DType, shape: number[], trainable: boolean }} Variable
 * @typedef {{ constants: number, state: number, slots: number, arena: number, workspace: number, statistics: number,
 *   description: number, total: number }} Memory bytes, as in evensong.h; `total` is all that the instance holds
 * @typedef {BufferSource | WebAssembly.Module | Response | Promise<Response>} ModuleSource
 */

const ABI_VERSION = 3;
const ALIGNMENT = 64;
const PAGE_BYTES = 65536;
const MAX_RANK = 6;
const MESSAGE_BYTES = 512;
const BORROW = 1;
const CHECK_INPUTS = 1;

const STATUS = ["ok", "corrupt", "artifact", "program", "argument", "example", "diverged", "memory"];

/** @type {Record<number, { name: DType, array: any, low: number, high: number }>} */
const DTYPES = {
  1: { name: "float32", array: Float32Array, low: -Infinity, high: Infinity },
  2: { name: "int8", array: Int8Array, low: -128, high: 127 },
  3: { name: "uint8", array: Uint8Array, low: 0, high: 255 },
  4: { name: "int32", array: Int32Array, low: -(2 ** 31), high: 2 ** 31 - 1 },
};

/** What went wrong; `code` is one of the statuses of evensong.h: "corrupt", "artifact", "example", "diverged", ... */
export class EvensongError extends Error {
  /** @param {string} code @param {string} message */
  constructor(code, message) {
    super(message);
    this.name = "EvensongError";
    this.code = code;
  }
}

/** A compiled module, from which sessions are made. */
export class Engine {
  #module;

  /** @param {WebAssembly.Module} module @param {string} instructionSet */
  constructor(module, instructionSet) {
    this.#module = module;
    /** "simd128" or "relaxed" */
    this.instructionSet = instructionSet;
  }

  /**
   * Compiles the best module that this machine takes. A source that is not used is not read.
   *
   * @param {{ simd128: ModuleSource | (() => ModuleSource), relaxed?: ModuleSource | (() => ModuleSource) }} sources
   *   functions are called only for the module that is taken
   * @returns {Promise<Engine>}
   */
  static async compile(sources) {
    if (!WebAssembly.validate(PROBE_SIMD)) {
      throw new EvensongError("argument", "this machine's WebAssembly has no SIMD; expected a browser from 2021 or later");
    }
    const relaxed = sources.relaxed !== undefined && WebAssembly.validate(PROBE_RELAXED);
    const chosen = relaxed ? sources.relaxed : sources.simd128;
    const module = await compileModule(await (typeof chosen === "function" ? chosen() : chosen));
    return new Engine(module, relaxed ? "relaxed" : "simd128");
  }

  /**
   * Verifies an artifact and makes it ready to run, with its initial weights.
   *
   * @param {BufferSource} artifact
   * @param {{ seed?: bigint }} [options] `seed` drives dropout, as an unsigned number of 64 bits
   * @returns {Promise<Session>}
   */
  async load(artifact, { seed = 0n } = {}) {
    const instance = await WebAssembly.instantiate(this.#module, {});
    return new Session(instance, bytesOf(artifact), seed);
  }
}

/** One artifact at work. */
export class Session {
  #c;
  #heap;
  #engine;
  #message;
  #options;
  #programs = new Map();
  #variables = new Map();
  #step = 0;
  #seed;

  /** Use {@link Engine.load}. @param {WebAssembly.Instance} instance @param {Uint8Array} artifact @param {bigint} seed */
  constructor(instance, artifact, seed) {
    const c = /** @type {any} */ (instance.exports);
    if (c.evensong_abi_version() !== ABI_VERSION) {
      throw new EvensongError("argument", `the module speaks C face ${c.evensong_abi_version()}; expected ${ABI_VERSION}`);
    }
    if (seed < 0n || seed >= 1n << 64n) throw new EvensongError("argument", "the seed has more than 64 bits, or a sign");
    const heap = new Heap(c.memory, c.__heap_base.value);
    this.#c = c;
    this.#heap = heap;
    this.#seed = seed;
    this.#message = heap.reserve(MESSAGE_BYTES);
    this.#options = heap.reserve(24);
    const result = heap.reserve(ALIGNMENT); // of calls that fill a structure
    const bytes = heap.reserve(artifact.length);
    heap.bytes(bytes, artifact.length).set(artifact);

    // The constants stay where the artifact lies.
    this.#check(c.evensong_memory_needed(bytes, artifact.length, BORROW, result, this.#message, MESSAGE_BYTES));
    const needed = heap.u32(result);
    const block = heap.reserve(needed);
    this.#check(
      c.evensong_open_in(block, needed, 0, bytes, artifact.length, BORROW, result, this.#message, MESSAGE_BYTES),
    );
    this.#engine = heap.u32(result);

    c.evensong_manifest(bytes, artifact.length, result, result + 4, this.#message, MESSAGE_BYTES);
    /** The artifact's manifest: model, task, labels. @type {Record<string, any>} */
    this.manifest = JSON.parse(heap.text(heap.u32(result), heap.u32(result + 4)) || "{}");
    this.#readVariables(result);
    this.#readPrograms(result);
    /** @type {Memory} */
    this.memory = this.#readMemory(result);
  }

  /** Programs by name. @returns {Map<string, Program>} */
  get programs() {
    return new Map([...this.#programs].map(([name, { maxBatch, inputs, outputs }]) => {
      return [name, { name, maxBatch, inputs: inputs.map(describePort), outputs: outputs.map(describePort) }];
    }));
  }

  /** Variables by name, in the author's shapes. @returns {Map<string, Variable>} */
  get variables() {
    return new Map([...this.#variables].map(([name, v]) => {
      return [name, { dtype: v.dtype.name, shape: [...v.shape], trainable: v.trainable }];
    }));
  }

  /** Training steps done. */
  get step() {
    return this.#step;
  }

  /**
   * The model's output for any number of examples, which lie one behind the other in each input.
   *
   * @param {...Input} inputs
   * @returns {Tensor}
   */
  predict(...inputs) {
    const program = this.#program("predict");
    const { values, examples } = takeInputs(program, inputs);
    const output = program.outputs[0];
    const each = output.batched ? output.elements : 0;
    const data = new output.dtype.array(each ? each * examples : output.elements);
    for (let start = 0; start < examples; start += program.maxBatch) {
      const count = Math.min(program.maxBatch, examples - start);
      this.#run(program, values, start, count, 0, 1);
      data.set(this.#heap.array(output.dtype, output.address, each ? each * count : output.elements), start * each);
    }
    const [first = 1, ...rest] = output.shape;
    return { data, shape: each ? [first * examples, ...rest] : [...output.shape] };
  }

  /**
   * One step of training on at most `maxBatch` examples. `inputs` is one input, or a list of all of them where the model
   * takes several. Throws "diverged" if a number is not finite; after a loss that is not, nothing has changed.
   *
   * @param {Input | Input[]} inputs
   * @param {Input} target
   * @param {{ learningRate: number }} options
   * @returns {{ loss: number, correct: number, examples: number }}
   */
  trainStep(inputs, target, { learningRate }) {
    const program = this.#program("train");
    const { values, examples } = takeInputs(program, [...splitInputs(program, inputs), target]);
    if (examples > program.maxBatch) {
      throw new EvensongError("example", `too many examples for one step; expected at most ${program.maxBatch}, got ${examples}`);
    }
    if (!(learningRate >= 0 && Number.isFinite(Math.fround(learningRate)))) {
      throw new EvensongError("argument", `the learning rate must be a finite number >= 0; got ${learningRate}`);
    }
    const [loss, correct] = program.outputs;
    this.#heap.array(loss.dtype, loss.address, 1)[0] = NaN; // finite afterwards if the loss was
    this.#run(program, values, 0, examples, learningRate, this.#step + 1);
    this.#step += 1;
    return { loss: this.#scalar(loss), correct: this.#scalar(correct), examples };
  }

  /**
   * Mean loss and number of correct answers over any number of examples.
   *
   * @param {Input | Input[]} inputs
   * @param {Input} target
   * @returns {{ loss: number, correct: number, examples: number }}
   */
  evaluate(inputs, target) {
    const program = this.#program("evaluate");
    const { values, examples } = takeInputs(program, [...splitInputs(program, inputs), target]);
    let [loss, correct] = [0, 0];
    for (let start = 0; start < examples; start += program.maxBatch) {
      const count = Math.min(program.maxBatch, examples - start);
      this.#run(program, values, start, count, 0, 1);
      loss += this.#scalar(program.outputs[0]) * count;
      correct += this.#scalar(program.outputs[1]);
    }
    return { loss: loss / examples, correct, examples };
  }

  /** A copy of a variable, in the author's layout. @param {string} name @returns {Tensor} */
  get(name) {
    const v = this.#variable(name);
    this.#check(
      this.#c.evensong_read_variable(this.#engine, v.index, this.#buffer, v.bytes, this.#message, MESSAGE_BYTES),
    );
    return { data: this.#heap.array(v.dtype, this.#buffer, v.elements).slice(), shape: [...v.shape] };
  }

  /** Overwrites a variable. @param {string} name @param {Input} value */
  set(name, value) {
    const v = this.#variable(name);
    const data = takeValues(value, v.dtype, name);
    if (data.length !== v.elements) {
      throw new EvensongError("argument", `'${name}' has ${v.elements} elements; got ${data.length}`);
    }
    if (v.dtype === DTYPES[1] && !data.every(Number.isFinite)) {
      throw new EvensongError("argument", `the new value of '${name}' is not finite`);
    }
    this.#heap.array(v.dtype, this.#buffer, v.elements).set(data);
    this.#check(
      this.#c.evensong_write_variable(this.#engine, v.index, this.#buffer, v.bytes, this.#message, MESSAGE_BYTES),
    );
  }

  /** The optimiser leaves these variables alone from now on; replaces the earlier choice. @param {string[]} names */
  freeze(names) {
    const indices = Uint32Array.from(names, (name) => this.#variable(name).index);
    new Uint32Array(this.#heap.buffer, this.#buffer, indices.length).set(indices);
    this.#check(
      this.#c.evensong_freeze(this.#engine, this.#buffer, indices.length, this.#message, MESSAGE_BYTES),
    );
  }

  // ----------------------------------------------------------------------------------------------------- the C face

  /** Where variables pass through, and the ports of the program that runs. */
  #buffer = 0;

  #run(program, values, start, count, learningRate, step) {
    program.inputs.forEach((port, i) => {
      const first = port.batched ? start * port.elements : 0;
      const size = port.batched ? count * port.elements : port.elements;
      this.#heap.array(port.dtype, port.address, size).set(values[i].subarray(first, first + size));
    });
    const view = this.#heap.view;
    for (const port of [...program.inputs, ...program.outputs]) {
      view.setUint32(port.buffer, port.address, true);
      view.setUint32(port.buffer + 4, port.bytes * (port.batched ? count : 1), true);
    }
    view.setFloat32(this.#options, learningRate, true);
    view.setUint32(this.#options + 4, CHECK_INPUTS, true);
    view.setBigUint64(this.#options + 8, BigInt(step), true);
    view.setBigUint64(this.#options + 16, this.#seed, true);
    this.#check(
      this.#c.evensong_run(
        this.#engine, program.index, count,
        program.inputsAt, program.inputs.length, program.outputsAt, program.outputs.length,
        this.#options, this.#message, MESSAGE_BYTES,
      ),
    );
  }

  #check(status) {
    if (status === 0) return;
    throw new EvensongError(STATUS[status] ?? "argument", this.#heap.string(this.#message));
  }

  #scalar(port) {
    return this.#heap.array(port.dtype, port.address, 1)[0];
  }

  #program(name) {
    const program = this.#programs.get(name);
    if (!program) throw new EvensongError("argument", `the artifact has no program '${name}'`);
    return program;
  }

  #variable(name) {
    const variable = this.#variables.get(name);
    if (!variable) throw new EvensongError("argument", `there is no variable '${name}'`);
    return variable;
  }

  #readVariables(result) {
    const [c, heap] = [this.#c, this.#heap];
    let most = 0;
    for (let index = 0; index < c.evensong_variable_count(this.#engine); ++index) {
      c.evensong_variable_info(this.#engine, index, result);
      const shape = heap.dims(result + 16, heap.u32(result + 12));
      const variable = {
        index,
        dtype: DTYPES[heap.u32(result + 4)],
        trainable: heap.u32(result + 8) === 1,
        shape,
        elements: product(shape),
        bytes: heap.u32(result + 16 + 4 * MAX_RANK),
      };
      this.#variables.set(heap.string(heap.u32(result)), variable);
      most = Math.max(most, variable.bytes, 4 * (index + 1));
    }
    this.#buffer = heap.reserve(most);
  }

  /** One program runs at a time: the buffers of all share their memory. */
  #readPrograms(result) {
    const [c, heap] = [this.#c, this.#heap];
    const found = [];
    for (let index = 0; index < c.evensong_program_count(this.#engine); ++index) {
      c.evensong_program_info(this.#engine, index, result);
      const [maxBatch, inputs, outputs] = [4, 8, 12].map((at) => heap.u32(result + at));
      const program = { index, maxBatch, inputs: [], outputs: [], inputsAt: 0, outputsAt: 0 };
      this.#programs.set(heap.string(heap.u32(result)), program);
      for (let i = 0; i < inputs; ++i) program.inputs.push(this.#readPort(index, 0, i, result));
      for (let i = 0; i < outputs; ++i) program.outputs.push(this.#readPort(index, 1, i, result));
      program.inputsAt = heap.reserve(8 * inputs);
      program.outputsAt = heap.reserve(8 * outputs);
      program.inputs.forEach((port, i) => (port.buffer = program.inputsAt + 8 * i));
      program.outputs.forEach((port, i) => (port.buffer = program.outputsAt + 8 * i));
      found.push(program);
    }
    const start = heap.reserve(0);
    const ends = found.map(({ inputs, outputs, maxBatch }) => {
      let next = start;
      for (const port of [...inputs, ...outputs]) {
        port.address = next;
        next = align(next + port.bytes * (port.batched ? maxBatch : 1));
      }
      return next;
    });
    heap.reserve(Math.max(start, ...ends) - start);
  }

  #readPort(program, output, index, result) {
    const heap = this.#heap;
    this.#c.evensong_port_info(this.#engine, program, output, index, result);
    const shape = heap.dims(result + 16, heap.u32(result + 12));
    const dtype = DTYPES[heap.u32(result + 4)];
    const elements = product(shape);
    const bytes = elements * dtype.array.BYTES_PER_ELEMENT;
    const batched = heap.u32(result + 8) === 1;
    return { name: heap.string(heap.u32(result)), dtype, shape, elements, bytes, batched, address: 0, buffer: 0 };
  }

  #readMemory(result) {
    this.#c.evensong_memory_info(this.#engine, result);
    const [constants, state, slots, arena, workspace, statistics, description] = [0, 4, 8, 12, 16, 20, 24].map((at) =>
      this.#heap.u32(result + at),
    );
    const total = this.#heap.buffer.byteLength;
    return { constants, state, slots, arena, workspace, statistics, description, total };
  }
}

// ------------------------------------------------------------------------------------------------------------- inputs

function splitInputs(program, inputs) {
  const count = program.inputs.length - 1; // the last one is the target
  if (count === 1 && !(Array.isArray(inputs) && inputs.length === 1 && typeof inputs[0] === "object")) return [inputs];
  if (!Array.isArray(inputs) || inputs.length !== count) {
    throw new EvensongError("example", `the program takes a list of ${count} inputs`);
  }
  return inputs;
}

/** Typed arrays of the ports' types, and the number of examples that all of them hold. */
function takeInputs(program, inputs) {
  if (inputs.length !== program.inputs.length) {
    throw new EvensongError("example", `the program takes ${program.inputs.length} inputs; got ${inputs.length}`);
  }
  const values = inputs.map((input, i) => takeValues(input, program.inputs[i].dtype, program.inputs[i].name));
  let examples = 0;
  values.forEach((data, i) => {
    const { name, batched, elements } = program.inputs[i];
    const count = data.length / elements;
    if (batched ? count < 1 || !Number.isInteger(count) : count !== 1) {
      const expected = batched ? `a multiple of ${elements}` : `${elements}`;
      throw new EvensongError("example", `'${name}' has the wrong size; expected ${expected} elements, got ${data.length}`);
    }
    if (batched && examples && count !== examples) {
      throw new EvensongError("example", `the inputs hold different numbers of examples: ${examples} and ${count}`);
    }
    if (batched) examples = count;
  });
  return { values, examples: examples || program.maxBatch };
}

function takeValues(input, dtype, name) {
  const data = input?.data ?? input;
  if (data instanceof dtype.array || (dtype.name === "uint8" && data instanceof Uint8ClampedArray)) return data;
  if (!Array.isArray(data)) {
    throw new EvensongError("example", `'${name}' takes ${dtype.array.name} or a list of numbers; got ${data?.constructor?.name}`);
  }
  const whole = dtype.name !== "float32";
  for (const value of data) {
    if (typeof value !== "number" || value < dtype.low || value > dtype.high || (whole && !Number.isInteger(value))) {
      throw new EvensongError("example", `'${name}' takes ${dtype.name} values; got ${value}`);
    }
  }
  return dtype.array.from(data);
}

function describePort({ name, dtype, shape, batched }) {
  return { name, dtype: dtype.name, shape: [...shape], batched };
}

// ------------------------------------------------------------------------------------------------------------- memory

/** The instance's memory behind its own data, handed out from the start. */
class Heap {
  #memory;
  #next;

  constructor(memory, base) {
    this.#memory = memory;
    this.#next = align(base);
  }
  get buffer() {
    return this.#memory.buffer;
  }
  get view() {
    return new DataView(this.buffer);
  }
  reserve(size) {
    const start = this.#next;
    const end = align(start + size);
    const pages = Math.ceil((end - this.buffer.byteLength) / PAGE_BYTES);
    try {
      if (pages > 0) this.#memory.grow(pages);
    } catch {
      throw new EvensongError("memory", `this machine has no memory left for an artifact that needs ${end} bytes`);
    }
    this.#next = end;
    return start;
  }
  u32(address) {
    return this.view.getUint32(address, true);
  }
  dims(address, rank) {
    return Array.from({ length: rank }, (_, axis) => this.u32(address + 4 * axis));
  }
  bytes(address, size) {
    return new Uint8Array(this.buffer, address, size);
  }
  array(dtype, address, elements) {
    return new dtype.array(this.buffer, address, elements);
  }
  text(address, size) {
    return new TextDecoder().decode(this.bytes(address, size));
  }
  /** Up to the first zero byte. */
  string(address) {
    const bytes = this.bytes(address, this.buffer.byteLength - address);
    return this.text(address, bytes.indexOf(0));
  }
}

function align(size) {
  return Math.ceil(size / ALIGNMENT) * ALIGNMENT;
}

function product(sizes) {
  return sizes.reduce((total, size) => total * size, 1);
}

function bytesOf(source) {
  return ArrayBuffer.isView(source)
    ? new Uint8Array(source.buffer, source.byteOffset, source.byteLength)
    : new Uint8Array(source);
}

async function compileModule(source) {
  if (source instanceof WebAssembly.Module) return source;
  if (ArrayBuffer.isView(source) || source instanceof ArrayBuffer) return WebAssembly.compile(source);
  if (!source.ok) throw new EvensongError("argument", `the engine's module could not be fetched: ${source.status}`);
  return WebAssembly.compile(await source.arrayBuffer());
}

// A module with one function, () -> v128, made of `code`.
function probe(...code) {
  const body = [0, 65, 0, 253, 15, ...code, 11]; // i32.const 0, i8x16.splat, ...
  const header = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0];
  return Uint8Array.from([...header, 10, body.length + 2, 1, body.length, ...body]);
}
const PROBE_SIMD = probe();
const PROBE_RELAXED = probe(65, 0, 253, 15, 65, 0, 253, 15, 253, 0x85, 2); // f32x4.relaxed_madd
