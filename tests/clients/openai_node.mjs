// One case of the client check: node openai_node.mjs CASE URL
// Prints what the client saw; test_openai_node.py says what that should be.

import http2 from "node:http2";
import OpenAI from "openai";

const [name, url] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0, timeout: 30_000 });
const ask = { model: "tiny", messages: [{ role: "user", content: "Say" }], temperature: 0 };

const cases = {
  async chat() {
    const answer = await client.chat.completions.create(ask);
    console.log(answer.choices[0].message.content);
  },

  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
      text += chunk.choices[0]?.delta.content ?? "";
    }
    console.log(text);
  },

  error: () => printError({ ...ask, max_tokens: "many" }),
  "unknown-model": () => printError({ ...ask, model: "nope" }),

  async abort() {
    const long = { ...ask, stream: true, max_tokens: 8000, ignore_eos: true };
    const stream = await client.chat.completions.create(long);
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta.content) {
        console.log(chunk.choices[0].delta.content);
        stream.controller.abort();
        break;
      }
    }
  },

  async h2c() {
    const session = http2.connect(url);
    try {
      for (const line of await Promise.all([streamByHttp2(session), streamByHttp2(session)])) {
        console.log(line);
      }
    } finally {
      session.close();
    }
  },
};

async function printError(request) {
  try {
    await client.chat.completions.create(request);
    console.log("no error");
  } catch (error) {
    console.log(error.constructor.name, error.status);
  }
}

async function streamByHttp2(session) {
  const body = JSON.stringify({ ...ask, stream: true });
  const stream = session.request({
    ":method": "POST",
    ":path": "/v1/chat/completions",
    "content-type": "application/json",
  });
  const head = new Promise((resolve, reject) => {
    stream.on("response", resolve);
    stream.on("error", reject);
  });
  stream.setEncoding("utf8");
  stream.end(body);
  const headers = await head;
  let events = "";
  for await (const piece of stream) events += piece;
  const data = events.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
  if (headers[":status"] !== 200 || data.pop() !== "[DONE]") throw new Error(`${headers[":status"]} ${events}`);
  const text = data.map((line) => JSON.parse(line).choices[0]?.delta.content ?? "").join("");
  return `${headers["x-forebay-upstream"].replace(/-\d$/, "")} ${text}`;
}

if (!(name in cases)) throw new Error(`no such case: ${name}`);
await cases[name]();
