// The JavaScript binding against what the compiled engine gave: node --test, with the folder in EVENSONG_TEST_FOLDER.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test from "node:test";
import { Engine, EvensongError } from "../../mobile_runtime/wasm/evensong.mjs";

const folder = process.env.EVENSONG_TEST_FOLDER;
const read = (name) => readFile(`${folder}/${name}`);
const expected = JSON.parse(await read("expected.json"));
const engine = await Engine.compile({ simd128: () => read("evensong.wasm") });
const open = async (name, options) => engine.load(await read(`${name}.evsg`), options);
const [trained, quantised] = await Promise.all([open("trained", { seed: BigInt(expected.seed) }), open("quantised")]);
const images = Float32Array.from(expected.images);
const labels = Int32Array.from(expected.labels);
const each = images.length / labels.length;

function close(actual, wanted, what) {
  assert.equal(actual.length, wanted.length, what);
  const largest = Math.max(1, ...wanted.map(Math.abs));
  for (let i = 0; i < wanted.length; ++i) assert.ok(Math.abs(actual[i] - wanted[i]) <= 1e-4 * largest, `${what} ${i}`);
}

function refuses(code, text, call) {
  assert.throws(call, (error) => error instanceof EvensongError && error.code === code && text.test(error.message));
}

test("a session describes its artifact", () => {
  assert.deepEqual([...trained.programs.keys()].sort(), ["evaluate", "predict", "train"]);
  assert.equal(trained.programs.get("train").maxBatch, expected.batch);
  assert.deepEqual(
    Object.fromEntries([...trained.variables].map(([name, { shape }]) => [name, shape])),
    expected.shapes,
  );
  assert.equal(trained.manifest.name, "binding");
  assert.equal(trained.memory.state, expected.state_bytes);
});

test("training gives the compiled engine's losses, weights and predictions", async () => {
  const session = await open("trained", { seed: BigInt(expected.seed) });
  for (const [step, loss] of expected.losses.entries()) {
    const start = (step * expected.batch) % (labels.length - expected.batch + 1);
    const result = session.trainStep(
      images.subarray(start * each, (start + expected.batch) * each),
      labels.subarray(start, start + expected.batch),
      { learningRate: 0.05 },
    );
    assert.ok(Math.abs(result.loss - loss) <= 1e-4 * Math.max(1, Math.abs(loss)), `step ${step}`);
    assert.equal(result.examples, expected.batch);
  }
  assert.equal(session.step, expected.losses.length);
  for (const [name, values] of Object.entries(expected.variables)) close(session.get(name).data, values, name);
  const prediction = session.predict(images); // more than one batch
  assert.deepEqual(prediction.shape, [labels.length, expected.predictions.length / labels.length]);
  close(prediction.data, expected.predictions, "prediction");
  const evaluation = session.evaluate(images, labels);
  close([evaluation.loss], [expected.evaluation.loss], "loss");
  assert.equal(evaluation.correct, expected.evaluation.correct);
});

test("an int8 model gives the compiled engine's bits", () => {
  assert.deepEqual([...quantised.predict(images).data], expected.quantised);
});

test("variables are written and read in the author's layout", async () => {
  const session = await open("trained");
  for (const [name, { data }] of [...session.variables.keys()].map((name) => [name, session.get(name)])) {
    const other = data.map((value, i) => value + i);
    session.set(name, other);
    assert.deepEqual(session.get(name).data, other);
  }
  const [name] = session.variables.keys();
  refuses("argument", /elements; got 1/, () => session.set(name, [1]));
  refuses("argument", /not finite/, () => session.set(name, session.get(name).data.fill(NaN)));
  refuses("argument", /no variable 'x'/, () => session.get("x"));
});

test("frozen variables stay as they are", async () => {
  const session = await open("trained");
  const before = new Map([...session.variables].map(([name]) => [name, session.get(name).data]));
  const frozen = [...session.variables].filter(([, v]) => v.trainable).map(([name]) => name).slice(1);
  session.freeze(frozen);
  session.trainStep(images.subarray(0, each), labels.subarray(0, 1), { learningRate: 0.1 });
  for (const name of frozen) assert.deepEqual(session.get(name).data, before.get(name));
  session.freeze([]);
  session.trainStep(images.subarray(0, each), labels.subarray(0, 1), { learningRate: 0.1 });
  assert.ok(frozen.some((name) => session.get(name).data.some((value, i) => value !== before.get(name)[i])));
});

test("two sessions share nothing", async () => {
  const [one, other] = [await open("trained"), await open("trained")];
  const before = other.predict(images).data;
  one.trainStep(images.subarray(0, each), labels.subarray(0, 1), { learningRate: 1 });
  assert.deepEqual(other.predict(images).data, before);
});

test("inputs may be lists, tensors or typed arrays, and wrong ones are refused", () => {
  const one = images.subarray(0, each);
  const right = trained.predict(one).data;
  assert.deepEqual(trained.predict([...one]).data, right);
  assert.deepEqual(trained.predict({ data: one, shape: [1, each] }).data, right);
  refuses("example", /wrong size; expected a multiple of/, () => trained.predict(one.subarray(1)));
  refuses("example", /wrong size/, () => trained.predict(new Float32Array(0)));
  refuses("example", /takes Float32Array/, () => trained.predict(new Float64Array(each)));
  refuses("example", /NaN or infinite/, () => trained.predict(one.map(() => NaN)));
  refuses("example", /takes 1 inputs; got 2/, () => trained.predict(one, one));
  refuses("example", /takes int32 values; got 0.5/, () => trained.evaluate(one, [0.5]));
  refuses("example", /different numbers of examples/, () => trained.evaluate(one, [0, 1]));
  refuses("example", /label .* out of range/, () => trained.trainStep(one, [99], { learningRate: 0.1 }));
  refuses("example", /too many examples/, () => trained.trainStep(images, labels, { learningRate: 0.1 }));
  refuses("argument", /learning rate/, () => trained.trainStep(one, [0], { learningRate: NaN }));
  refuses("diverged", /Lower the learning rate/, () => trained.trainStep(one.map(() => 3e38), [0], { learningRate: 1 }));
});

test("damaged artifacts are refused", async () => {
  const artifact = new Uint8Array(await read("trained.evsg"));
  artifact[artifact.length - 1] ^= 1;
  await assert.rejects(engine.load(artifact), (error) => error.code === "corrupt" && /CRC32C/.test(error.message));
  await assert.rejects(engine.load(new Uint8Array(3)), (error) => error.code === "corrupt");
  await assert.rejects(engine.load(new ArrayBuffer(0)), (error) => error.code === "corrupt");
});

test("a module that could not be fetched is an error", async () => {
  await assert.rejects(Engine.compile({ simd128: new Response("", { status: 404 }) }), /could not be fetched: 404/);
  const fetched = await Engine.compile({ simd128: Promise.resolve(new Response(await read("evensong.wasm"))) });
  assert.equal(fetched.instructionSet, "simd128");
});
