// Run a GGUF file in llama.cpp through node-llama-cpp: probabilities, greedy tokens, seconds.
// Usage: node llama_cpp.mjs FOLDER < request.json > answer.json, where FOLDER holds node_modules.
// request: {model, threads, context, prompts: [[id]], greedy: n, texts: [text], decode: {prompt: n, tokens: n, repeats: n}}
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const where = `${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`;
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(where));
const request = JSON.parse(readFileSync(0, "utf8"));
const threads = request.threads ?? 1;

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads});
const model = await llama.loadModel({modelPath: request.model, gpuLayers: 0, useMmap: true});
const context = await model.createContext({contextSize: request.context ?? 128, threads, batchSize: 128});
const sequence = context.getSequence();

// the distribution of the next token after every token of a prompt
async function probabilities(prompt) {
    await sequence.clearHistory();
    const input = prompt.map((token) => [token, {generateNext: {probabilities: true}}]);
    const output = await sequence.controlledEvaluate(input);
    return output.map(({next}) => {
        const row = new Array(next.probabilities.size).fill(0);
        for (const [token, p] of next.probabilities) row[token] = p;
        return row;
    });
}

async function generate(prompt, count) {
    await sequence.clearHistory();
    const tokens = [];
    if (count === 0) return {tokens, seconds: 0};
    let start = 0;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (tokens.length === 0) start = performance.now();
        tokens.push(token);
        if (tokens.length === count) break;
    }
    return {tokens, seconds: (performance.now() - start) / 1000};
}

const answer = {probabilities: [], greedy: [], texts: [], seconds: []};
for (const prompt of request.prompts ?? []) {
    if (request.probabilities ?? true) answer.probabilities.push(await probabilities(prompt));
    if (request.greedy) answer.greedy.push((await generate(prompt, request.greedy)).tokens);
}
for (const text of request.texts ?? []) {
    const tokens = model.tokenize(text, true);
    answer.texts.push({tokens, text: model.detokenize(tokens)});
}
if (request.decode) {
    const {prompt, tokens, repeats} = request.decode;
    const ids = Array.from({length: prompt}, (_, i) => 5 + (i * 37) % 70);
    for (let i = 0; i < repeats; i++) {
        const {tokens: made, seconds} = await generate(ids, tokens + 1);
        answer.seconds.push(seconds / (made.length - 1));
    }
}
process.stdout.write(JSON.stringify(answer));
await llama.dispose();
