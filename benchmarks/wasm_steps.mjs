// Times the WebAssembly engine in Node: node wasm_steps.mjs MODULE.wasm JOBS.json; prints one JSON object.
//
// A job is { name, artifact, inputs, classes, batch, seconds }: the least milliseconds of a training step in blocks of about
// 20 ms; or, without a batch, of everything from a module's bytes to the first prediction.
import { readFile } from "node:fs/promises";
import { Engine } from "../mobile_runtime/wasm/evensong.mjs";

const [modulePath, jobsPath] = process.argv.slice(2);
const moduleBytes = await readFile(modulePath);
const results = {};
for (const job of JSON.parse(await readFile(jobsPath))) {
  const artifact = await readFile(job.artifact);
  results[job.name] = job.batch ? await step(job, artifact) : await firstPrediction(job, artifact);
}
console.log(JSON.stringify(results));

async function step({ inputs, classes, batch, seconds }, artifact) {
  const engine = await Engine.compile({ simd128: moduleBytes });
  const session = await engine.load(artifact);
  const x = Float32Array.from({ length: batch * inputs }, (_, i) => Math.sin(i));
  const y = Int32Array.from({ length: batch }, (_, i) => i % classes);
  const train = () => session.trainStep(x, y, { learningRate: 0.001 });
  const end = performance.now() + 1000 * seconds;
  let least = Infinity;
  let calls = 1;
  while (performance.now() < end) {
    const start = performance.now();
    for (let i = 0; i < calls; ++i) train();
    const each = (performance.now() - start) / calls;
    least = Math.min(least, each);
    calls = Math.max(1, Math.round(20 / each));
  }
  return least;
}

async function firstPrediction({ inputs }, artifact) {
  const x = new Float32Array(inputs);
  let least = Infinity;
  for (let run = 0; run < 20; ++run) {
    const start = performance.now();
    const engine = await Engine.compile({ simd128: moduleBytes });
    (await engine.load(artifact)).predict(x);
    least = Math.min(least, performance.now() - start);
  }
  return least;
}
