import json, os, sys, time
import numpy as np, torch
torch.set_num_threads(1)
import gymnasium, dpok_gym
from agents import DPOK, PRESETS, evaluate
from agents.algorithms.registry import load_algorithm
from agents.common.evaluation import cycle_prompts
from stable_baselines3.common.callbacks import BaseCallback
from dpok_gym import diffusion
from dpok_gym.registration import FIRST_TASKS
P = FIRST_TASKS["DPOK-Shapes-v0"]["prompts"]

class Hist(BaseCallback):
    def __init__(self): super().__init__(); self.rows = []
    def _on_step(self): return True
    @torch.no_grad()
    def _on_rollout_end(self):
        b = self.model.rollout_buffer; skl = []
        if self.model.draws_with_reference: return
        for i in range(b.num_inference_steps):
            m, s = self.model.policy.reference_transition(b.state_at(i))
            skl.append(float(diffusion.kl_divergence(b.means[:, i], m, s).mean()))
        self.rows.append(dict(reward=float(b.final_rewards.mean()), step_kl=skl, beta=getattr(self.model, "kl_coef", 0), **{"m_"+k: v for k, v in self.model.latest_metrics.items()}))

def shifted(cls, shift):
    class Shifted(cls):
        def advantages(self, buffer):
            return super().advantages(buffer) + shift
    return Shifted

def run(cfg):
    t0 = time.time(); dev = cfg.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    algo = cfg.get("algo", "dpok"); p = PRESETS["laptop"]; kw = p.algorithm_kwargs(algo)
    ch = dict(cfg.get("kw", {})); pk = {**kw.pop("policy_kwargs"), **ch.pop("policy_kwargs", {})}
    kw.update(ch)
    if algo == "dpok": kw.setdefault("use_critic", False)
    env = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=64, device=dev, **{**p.env_kwargs, "decode_batch_size": 64, **cfg.get("env", {})})
    cls = load_algorithm(algo)
    if cfg.get("shift"): cls = shifted(cls, cfg["shift"])
    if cfg.get("pd"):
        g, d, cap = cfg["pd"]
        class PD(cls):
            last = None
            @property
            def kl_step_weights(self):
                return torch.where(self.step_weights > 0, self.step_weights, 1e-3 / self.kl_coef)
            def _adapt_kl_coef(self, target):
                import math
                kl = torch.cat(self._metrics["kl_to_reference"]).mean().item()
                x = math.log(max(kl, 1e-9) / target)
                change = g * x + (d * (x - self.last) if self.last is not None else 0)
                self.last = x
                if self.iteration >= 1: self.kl_coef *= math.exp(min(max(change, -cap), cap))
        cls = PD
    agent = cls(env=env, seed=cfg.get("seed", 0), device=dev, policy_kwargs=pk, **kw)
    h = Hist(); agent.learn(cfg.get("images", 2240) * agent.process.num_inference_steps, h)
    e = evaluate(agent.policy, env, cfg.get("eval", [P] * 256), seed=1000)
    from dpok_gym.prompts import load_prompts
    from dpok_gym.shapes.prompts import unseen_prompts
    u = evaluate(agent.policy, env, cycle_prompts(list(unseen_prompts(load_prompts(p.env_kwargs["prompts"]))), 128), seed=5000)
    return dict(cfg=cfg, aligned=e.aligned_share, quality=e.mean_quality, reward=e.mean_reward, step_kl=e.step_kl.mean(0).tolist(), u_aligned=u.aligned_share, u_quality=u.mean_quality, history=h.rows, seconds=time.time() - t0)

if __name__ == "__main__":
    cfg = json.loads(sys.argv[1])
    try: r = run(cfg)
    except Exception as ex:
        import traceback; traceback.print_exc(); r = dict(cfg=cfg, error=repr(ex))
    with open(sys.argv[2], "a") as f: f.write(json.dumps(r) + "\n")
