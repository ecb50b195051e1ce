import json, sys, time, torch, gymnasium
torch.set_num_threads(1)
from agents import DPOK, PRESETS
from benchmarks.mixture_policies import on_grid, half_reward
from dpok_gym.mixture.exact import best_policy
def go(name, beta, T=20, n=256, seed=0, images=15360, **kw):
    t0=time.time()
    env = gymnasium.make_vec("DPOK-Mixture-v0", num_envs=n, vectorization_mode="vector_entry_point", model="mixture-1d", prompts=["two modes"], reward={"mixture-linear": 0.5}, num_inference_steps=T, device="cpu")
    agent = DPOK(env=env, seed=seed, kl_coef=beta, device="cpu", **kw)
    agent.learn(images*T)
    ref = on_grid(agent.policy, "two modes", reference=True); p = on_grid(agent.policy, "two modes")
    obj = lambda q: float(q.expectation(half_reward) - beta * q.step_kl(ref).sum())
    b=obj(best_policy(ref, half_reward, beta, True)); l=obj(best_policy(ref, half_reward, beta, False))
    print(name, f"obj {obj(p):.4f} best {b:.4f} share {obj(p)/b:.3f} paper {l/b:.3f} kl {p.step_kl(ref).sum():.3f} {time.time()-t0:.0f}s", flush=True)
for spec in sys.argv[1:]:
    name, beta, kw = spec.split("|"); go(name, float(beta), **json.loads(kw))
