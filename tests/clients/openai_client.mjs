// The openai client for Node.js against a running server: a second parser of streams and errors.
//   BASE_URL=http://127.0.0.1:8000/v1 node openai_client.mjs     (with `openai` in a node_modules above)
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: 'x', maxRetries: 0 });
const asked = { model: 'reverse', temperature: 0, messages: [{ role: 'user', content: 'hello world' }] };

const whole = await client.chat.completions.create(asked);
assert.equal(whole.choices[0].message.content, 'dlrow olleh');

let text = '';
let usage = null;
const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? '';
  usage = chunk.usage ?? usage;
}
assert.equal(text, 'dlrow olleh');
assert.equal(usage.total_tokens, whole.usage.total_tokens);

await assert.rejects(
  client.chat.completions.create({ ...asked, model: 'nope' }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === 'model_not_found' && error.param === 'model',
);
await assert.rejects(
  client.chat.completions.create({ ...asked, temperature: 9 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === 'temperature',
);

// Leaving in the middle of a stream is no error, for either side.
const left = await client.chat.completions.create({ ...asked, model: 'demo', stream: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta?.content) break;
}
assert.equal((await client.chat.completions.create(asked)).choices[0].message.content, 'dlrow olleh');

const schema = { type: 'object', properties: { name: { type: 'string' }, age: { type: 'integer' } }, required: ['name', 'age'], additionalProperties: false };
const formatted = await client.chat.completions.create({
  ...asked, model: 'person', response_format: { type: 'json_schema', json_schema: { name: 'person', schema, strict: true } },
});
assert.deepEqual(JSON.parse(formatted.choices[0].message.content), { name: 'Ada', age: 36 });
console.log('ok');
