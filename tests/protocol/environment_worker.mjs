// The environment worker of the SDK `@anthropic-ai/sdk`, with its own tools and a custom one.
// Arguments: base URL, environment id, environment key, working directory. Ends at SIGTERM.

import Anthropic from '@anthropic-ai/sdk';
import { betaTool } from '@anthropic-ai/sdk/helpers/beta/json-schema';
import { betaAgentToolset20260401 } from '@anthropic-ai/sdk/tools/agent-toolset/node';

const [baseURL, environmentId, environmentKey, workdir] = process.argv.slice(2);

const weather = betaTool({
  name: 'weather',
  description: 'Tell the weather.',
  inputSchema: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  run: ({ city }) => `rain in ${city}`,
});

const stop = new AbortController();
process.once('SIGTERM', () => stop.abort());
const client = new Anthropic({ baseURL, authToken: environmentKey, logLevel: 'info' });
await client.beta.environments.work
  .worker({
    environmentId,
    environmentKey,
    workdir,
    maxIdleMs: 50,
    tools: (context) => [...betaAgentToolset20260401(context), weather],
  })
  .run(stop.signal);
