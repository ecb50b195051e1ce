import json, sys, subprocess, time, os
from concurrent.futures import ThreadPoolExecutor
cfgs = json.load(open(sys.argv[1])); out = sys.argv[2]; n = int(sys.argv[3]); limit = float(sys.argv[4]); t0 = time.time()
script = sys.argv[5] if len(sys.argv) > 5 else ".sweep/exp.py"
def go(c):
    if time.time() - t0 > limit: return
    subprocess.run([sys.executable, script, json.dumps(c), out], env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=open(out + ".err", "a"))
with ThreadPoolExecutor(n) as ex: list(ex.map(go, cfgs))
print("done", time.time() - t0)
