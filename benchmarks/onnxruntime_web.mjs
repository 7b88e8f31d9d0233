// Greedy tokens of a bundle's model.onnx in WebAssembly, the runtime of the target wasm-browser; here under Node.js.
//
//     mkdir -p build/web && cd build/web && npm install onnxruntime-web@1.30.0
//     node ../../benchmarks/onnxruntime_web.mjs BUNDLE 1,17,5 [NEW_TOKENS]
//
// Prints token ids as JSON. The package is looked for in the current folder. One thread: under Node.js it has no others.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

const [bundle, prompt, count = '16'] = process.argv.slice(2);
if (!bundle || !/^\d+(,\d+)*$/.test(prompt ?? '') || !/^\d+$/.test(count)) {
  console.error('usage: node onnxruntime_web.mjs BUNDLE ID,ID,... [NEW_TOKENS]');
  process.exit(2);
}
const ort = createRequire(path.resolve('package.json'))('onnxruntime-web/wasm');
ort.env.wasm.numThreads = 1;
const { decoder } = JSON.parse(readFileSync(path.join(bundle, 'genai_config.json'), 'utf8')).model;
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(path.join(bundle, 'model.onnx'))), {
  executionProviders: ['wasm'],
});

const ids = prompt.split(',').map(Number);
const started = ids.length;
const empty = () => new ort.Tensor('float32', new Float32Array(0), [1, decoder.num_key_value_heads, 0, decoder.head_size]);
const cache = Object.fromEntries(session.inputNames.filter((name) => name.startsWith('past')).map((name) => [name, empty()]));
const whole = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
for (let step = 0, fresh = ids; step < Number(count); step++) {
  const found = await session.run({ input_ids: whole(fresh), attention_mask: whole(ids.map(() => 1)), ...cache });
  const [, rows, vocabulary] = found.logits.dims;
  const last = found.logits.data.subarray((rows - 1) * vocabulary, rows * vocabulary);
  fresh = [last.indexOf(last.reduce((most, value) => Math.max(most, value), -Infinity))];
  ids.push(...fresh);
  for (const name of Object.keys(cache)) cache[name] = found[name.replace('past_key_values', 'present')];
}
console.log(JSON.stringify(ids.slice(started)));
