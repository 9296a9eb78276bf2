"""Constants of this machine for `act_plan`, and predictions held against the clock, each taken while nothing else ran.

    python benchmarks/scale.py --folder /somewhere/with/10/GB --out act/results/scale.json

What `act_plan --measure` does, except that every single measurement waits for a quiet moment and is repeated when other
processes took more than a tenth of the processors meanwhile (Linux).
"""

import argparse, os, resource, time
from act.commands.tools import act_plan
from act.tools import machine


def busy():
    "Seconds since the machine started, over all processors: worked (stolen time included), and passed."
    t = [int(v) / os.sysconf('SC_CLK_TCK') for v in open('/proc/stat').readline().split()[1:9]]
    return sum(t) - t[3] - t[4], sum(t)


def own():
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def others(f):
    "(f(), share of the processors that other processes took meanwhile)"
    (b, all_), mine = busy(), own()
    value = f()
    (b2, all2), mine2 = busy(), own()
    return value, (b2 - b - (mine2 - mine)) / max(0.01, all2 - all_)


def quiet(f, limit=0.1):
    "`f`, waiting for quiet before and repeated until it was quiet all along."

    def run(*args, **kwargs):
        while True:
            while others(lambda: time.sleep(2))[1] > limit:
                pass
            value, share = others(lambda: f(*args, **kwargs))
            print(f'{f.__name__}: others took {share:.0%}', flush=True)
            if share <= limit:
                return value

    return run


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--folder', required=True)
    p.add_argument('--out', required=True)
    a = p.parse_args()
    machine._rate, machine._timed_cold = quiet(machine._rate), quiet(machine._timed_cold)
    act_plan(measure=a.folder, constants=a.out, model='qwen2.5-7b')
