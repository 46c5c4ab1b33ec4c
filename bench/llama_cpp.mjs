// Run GGUF files in llama.cpp through node-llama-cpp: probabilities, greedy tokens, seconds.
// Usage: node llama_cpp.mjs FOLDER < requests.json > answers.json, where FOLDER holds node_modules.
// requests: [{model, threads, context, kv: "F16" | "F32", prompts: [[id]], greedy: n, texts: [text],
//             decode: {prompt: n, tokens: n, repeats: n}}]
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const where = `${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`;
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(where));
const requests = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});

// the distribution of the next token after every token of a prompt
async function probabilities(sequence, prompt) {
    await sequence.clearHistory();
    const input = prompt.map((token) => [token, {generateNext: {probabilities: true}}]);
    const output = await sequence.controlledEvaluate(input);
    return output.map(({next}) => {
        const row = new Array(next.probabilities.size).fill(0);
        for (const [token, p] of next.probabilities) row[token] = p;
        return row;
    });
}

// greedy tokens, and the seconds of the processor from the first of them to the last
async function generate(sequence, prompt, count) {
    await sequence.clearHistory();
    const tokens = [];
    let start = process.cpuUsage();
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (tokens.length === 0) start = process.cpuUsage();
        tokens.push(token);
        if (tokens.length === count) break;
    }
    const {user, system} = process.cpuUsage(start);
    return {tokens, seconds: (user + system) / 1e6};
}

async function answerTo(request) {
    const threads = request.threads ?? 1;
    const model = await llama.loadModel({modelPath: request.model, gpuLayers: 0});
    const context = await model.createContext({
        contextSize: request.context ?? 128,
        threads,
        batchSize: 128,
        experimentalKvCacheKeyType: request.kv ?? "F16",
        experimentalKvCacheValueType: request.kv ?? "F16"
    });
    const sequence = context.getSequence();
    const answer = {probabilities: [], greedy: [], texts: [], seconds: []};
    for (const prompt of request.prompts ?? []) {
        answer.probabilities.push(await probabilities(sequence, prompt));
        if (request.greedy) answer.greedy.push((await generate(sequence, prompt, request.greedy)).tokens);
    }
    for (const text of request.texts ?? []) {
        const tokens = model.tokenize(text, true);
        answer.texts.push({tokens, text: model.detokenize(tokens)});
    }
    const {prompt, tokens, repeats} = request.decode ?? {prompt: 0, tokens: 0, repeats: 0};
    const ids = Array.from({length: prompt}, (_, i) => 5 + (i * 37) % 70);
    for (let i = 0; i < repeats; i++) {
        const made = await generate(sequence, ids, tokens + 1);
        answer.seconds.push(made.seconds / (made.tokens.length - 1));
    }
    await model.dispose();
    return answer;
}

const answers = [];
for (const request of requests) answers.push(await answerTo(request));
process.stdout.write(JSON.stringify(answers));
await llama.dispose();
