// BullMQ: the fewer its runs the higher a job's priority. A job whose machine is busy is put off by a millisecond.
import { setTimeout as sleep } from 'node:timers/promises';
import { DelayedError, Queue, Worker } from 'bullmq';
import Redis from 'ioredis';

const [vms, perVm, slots] = [100, 10, 64];
const { REDIS_URL, OP_MS, WARM_UP, MEASURED } = process.env;
const [opMs, warmUp, measured] = [Number(OP_MS), Number(WARM_UP), Number(MEASURED)];
const connection = new Redis(REDIS_URL, { maxRetriesPerRequest: null });
const queue = new Queue('ops', { connection });

async function cpu() {
  const { user, system } = process.cpuUsage();
  const info = await connection.info('cpu');
  const broker = [...info.matchAll(/^used_cpu_(?:user|sys):([\d.]+)/gm)].reduce((sum, match) => sum + Number(match[1]), 0);
  return [(user + system) / 1e6, broker];
}

const job = (vm, runs) => ({
  name: 'op',
  data: { vm, runs },
  opts: { priority: runs + 1, removeOnComplete: true, removeOnFail: true },
});

const busy = new Set();
let done = 0;
let begun;
let finish;
const finished = new Promise((resolve) => (finish = resolve));

const worker = new Worker(
  'ops',
  async (one, token) => {
    const { vm, runs } = one.data;
    if (busy.has(vm)) {
      await one.moveToDelayed(Date.now() + 1, token);
      throw new DelayedError();
    }
    busy.add(vm);
    try {
      if (opMs > 0) await sleep(opMs);
    } finally {
      busy.delete(vm);
    }
    const next = job(vm, runs + 1);
    await queue.add(next.name, next.data, next.opts);
    done += 1;
    if (done === warmUp) begun = await cpu();
    if (done === warmUp + measured) finish(await cpu());
  },
  { connection, concurrency: slots, autorun: false },
);
await queue.addBulk(Array.from({ length: vms * perVm }, (_, number) => job(number % vms, 0)));
worker.run();
const ended = await finished;
console.log(measured, ended[0] - begun[0], ended[1] - begun[1]);
process.exit(0);
