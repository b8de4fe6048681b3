"""Celery with a pool of threads. A task takes its machine's lock, and waits for it with its thread."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import redis
from celery import Celery

VMS, PER_VM, SLOTS = 100, 10, 64
URL = os.environ["REDIS_URL"]
OP_S = int(os.environ["OP_MS"]) / 1000
WARM_UP, MEASURED = int(os.environ["WARM_UP"]), int(os.environ["MEASURED"])
DEADLINE_S = 300

app = Celery("bench", broker=URL)
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True)

locks = [threading.Lock() for _ in range(VMS)]
count_lock = threading.Lock()
done = 0
begun = None


def cpu():
    info = redis.Redis.from_url(URL).info("cpu")
    return time.process_time(), info["used_cpu_user"] + info["used_cpu_sys"]


@app.task(name="op")
def op(vm):
    global done, begun
    with locks[vm]:
        if OP_S > 0:
            time.sleep(OP_S)
    op.delay(vm)
    with count_lock:
        done += 1
        count = done
    if count == WARM_UP:
        begun = cpu()
    if count == WARM_UP + MEASURED:
        ended = cpu()
        result = os.environ["RESULT"]
        with open(result + ".part", "w") as file:
            print(MEASURED, ended[0] - begun[0], ended[1] - begun[1], file=file)
        os.rename(result + ".part", result)


def main():
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result")
        worker = [sys.executable, "-m", "celery", "-A", "bench", "worker", "-P", "threads", "-c", str(SLOTS), "-l", "ERROR"]
        worker += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        here = os.path.dirname(os.path.abspath(__file__))
        env = {**os.environ, "RESULT": result, "PYTHONDONTWRITEBYTECODE": "1"}
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(worker, cwd=here, env=env, stdout=quiet, stderr=quiet)
        try:
            for number in range(VMS * PER_VM):
                op.delay(number % VMS)
            deadline = time.monotonic() + DEADLINE_S
            while not os.path.exists(result):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("the worker came to no end")
                time.sleep(0.1)
            with open(result) as file:
                print(file.read().strip())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
