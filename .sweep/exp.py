"""Sweep of core designs."""
import json, math, os, sys, time
import numpy as np, torch
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
import gymnasium, dpok_gym
from agents import DPOK, PRESETS, evaluate
from agents.common import losses
from dpok_gym import diffusion
from dpok_gym.registration import FIRST_TASKS

KNOBS = dict(ratio="mean", clip=0.0, clipmode="ppo", pg="output", klw="ones", skip=0, skipkl=0, scale=True, center=True, warmup=0, beta=0.002,
             target=None, kls=1.0, gain=0.5, betaprop=None, anneal="linear")

class Exp(DPOK):
    def __init__(self, policy="DenoisingPolicy", env=None, *, knobs: dict, **kw):
        self.k = {**KNOBS, **knobs}
        super().__init__(policy, env, use_critic=False, normalize_advantage=False, **kw)
        self.beta = self.k["beta"]
        self.history = []

    def _tables(self):
        t = self.process.table
        r = (t.output_coef.abs() / t.std).cpu()
        T = len(r)
        w = torch.ones(T)
        if self.k["pg"] == "output": w = 1 / r; 
        if self.k["pg"] == "floor": w = 1 / r.clamp(max=1.2)   # singular step keeps the small weight? see klw
        if self.k["pg"] == "output2": w = 1 / r**2
        w = w / w.mean() if self.k["pg"] != "likelihood" else w
        if self.k["pg"] == "dropl":
            w = torch.where(r > 3, 0.0, 1.0)
        if self.k["pg"] == "dropsqrt":
            w = torch.where(r > 3, 0.0, r ** -0.5); w = w / w.mean()
        if self.k["skip"]:
            w[-self.k["skip"]:] = 0
        if self.k["pg"] == "drop":
            w = torch.where(r > 3, 0.0, 1 / r); w = w / w.mean()
        klw = {"ones": torch.ones(T), "same": w.clone(), "output": (1/r) / (1/r).mean(), "capped": torch.clamp(1 / r, max=1.0) ** 2 , "regsame": torch.where(r > 3, 1.0, w), "cap_same": w * torch.clamp(1.0 / r, max=1.0) }[self.k["klw"]]
        if self.k["klw"] == "capped": # KL in output units for steps with r > 1
            klw = torch.where(r > 1, 1 / r**2, torch.ones(T))
        klw = torch.where(r > 3, klw * self.k["kls"], klw)
        if self.k["skipkl"]:
            klw[-self.k["skipkl"]:] = 0
        d = t.std.device
        return w.to(d), klw.to(d), r.to(d)

    def train(self):
        buf = self.rollout_buffer
        r = buf.final_rewards
        A = r - r.mean() if self.k["center"] else r
        self.s = float(A.std(correction=0)) if self.k["scale"] else 1.0
        buf.advantages = A[:, None].expand_as(buf.rewards)
        w, klw, _ = self._tables()
        self.klw = klw
        # measure KL of the rollout to the reference
        with torch.no_grad():
            skl = []
            for i in range(buf.num_inference_steps):
                st = buf.state_at(i)
                m, s = self.policy.reference_transition(st)
                skl.append(float(diffusion.kl_divergence(buf.means[:, i], m, s).mean()))
        self.history.append(dict(reward=float(r.mean()), step_kl=skl, beta=self.beta, s=self.s))
        if self.k["target"] and self.iteration > 0:
            _, _, rr = self._tables()
            kl = sum(k for k, q in zip(skl, rr.tolist()) if q <= 3)
            self.beta *= math.exp(min(max(self.k["gain"] * math.log(max(kl,1e-6) / self.k["target"]), -0.3), 0.3))
        if self.k["betaprop"]: self.beta = self.k["betaprop"] * self.s
        if self.iteration < self.k["warmup"]:
            for g in self.policy.optimizer.param_groups: g["lr"] *= (self.iteration + 1) / (self.k["warmup"] + 1)
        from agents.common.randomness import Purpose, make_generator
        m0 = len(self._metrics.get("clipped", []))
        for epoch in range(self.n_epochs):
            rng = make_generator(self.run_seed, Purpose.BATCHES, self.iteration, epoch)
            for batch in buf.batches(self.batch_size, rng, 1.0, None, w):
                with self.optimizer_step():
                    self.backward(batch)
        self.history[-1].update(clipped=float(torch.cat(self._metrics["clipped"]).mean()), klold=float(torch.cat(self._metrics["klold"]).mean())*10, grad=float(torch.cat([g.reshape(-1) for g in self._metrics["grad_norm"]]).mean()))

    def loss(self, batch):
        mean, std = self.policy.transition(batch.state)
        old, x, A = batch.old_means, batch.actions, batch.advantages
        D = mean[0].numel()
        klold = diffusion.kl_divergence(mean.detach(), old, std)
        k = self.k["ratio"]
        if k == "sum":
            lr = diffusion.log_ratio(x, mean, old, std); unit = 1
        elif k == "mean":
            lr = diffusion.log_ratio(x, mean, old, std) / D; unit = D
        elif k in ("linear", "guard"):
            lr = diffusion.reduce((mean - old) * (x - old) / diffusion.expand(std, x).square(), "sum") / D; unit = D
        c = self.k["clip"]
        if k == "linear":
            surr = -A * lr * D
        else:
            surr = -A * lr.clamp(-20, 20).exp() * unit
        if self.k["clipmode"] == "ppo" and c:
            cl = -A * lr.clamp(-c / unit, c / unit).exp() * unit
            surr = torch.maximum(surr, cl) if k != "linear" else surr
            clipped = (lr.detach().abs() > c / unit).float()
        elif self.k["clipmode"] == "klmask" and c:
            away = (A * lr.detach()) > 0
            drop = away & (klold > c)
            surr = surr * (~drop)
            clipped = drop.float()
        else:
            clipped = torch.zeros_like(A)
        loss = batch.step_weight * surr
        if self.beta:
            ref = self.reference_mean(batch.state)
            loss = loss + self.beta * self.klw[batch.step] * diffusion.kl_divergence(mean, ref, std)
        return loss / (self.s * D) if self.s else loss * 0, {"clipped": clipped, "klold": klold}

    def state_dict(self): return {}

def run_mix(cfg):
    from benchmarks.mixture_policies import on_grid, half_reward
    from dpok_gym.mixture.exact import best_policy
    t0 = time.time()
    T = cfg.get("T", 20); n = cfg.get("n", 256); beta = cfg["knobs"]["beta"]
    env = gymnasium.make_vec("DPOK-Mixture-v0", num_envs=n, vectorization_mode="vector_entry_point", model="mixture-1d", prompts=["two modes"], reward={"mixture-linear": 0.5}, num_inference_steps=T, device="cpu")
    kw = dict(images_per_iteration=n, learning_rate=1e-3, batch_size=64, micro_batch_size=None, policy_kwargs={}); kw.update(cfg.get("kw", {}))
    kw["policy_kwargs"] = {**kw["policy_kwargs"], **cfg.get("pk", {})}
    agent = Exp(env=env, seed=cfg.get("seed", 0), knobs=cfg["knobs"], device="cpu", **kw)
    agent.learn(15360 * T)
    ref = on_grid(agent.policy, "two modes", reference=True); p = on_grid(agent.policy, "two modes")
    def obj(q): return q.expectation(half_reward) - beta * q.step_kl(ref).sum()
    best = best_policy(ref, half_reward, beta, True); loss = best_policy(ref, half_reward, beta, False)
    return dict(cfg=cfg, objective=float(obj(p)), best=float(obj(best)), paper=float(obj(loss)), none=float(obj(ref)), kl=float(p.step_kl(ref).sum()), seconds=time.time() - t0)

def run(cfg):
    if cfg.get("mix"): return run_mix(cfg)
    if "optimizer_kwargs" in cfg.get("pk", {}): cfg["pk"]["optimizer_kwargs"]["betas"] = tuple(cfg["pk"]["optimizer_kwargs"].get("betas", (0.9, 0.999)))
    t0 = time.time()
    dev = cfg.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    iters = cfg.get("iterations", 35)
    env = gymnasium.make_vec("DPOK-Shapes-v0", num_envs=64, device=dev, **{**FIRST_TASKS["DPOK-Shapes-v0"], "decode_batch_size": 64, **cfg.get("env", {})})
    kw = dict(images_per_iteration=64, learning_rate=3e-3, final_lr_fraction=0.05, batch_size=64, policy_kwargs={"lora_rank": 16, "target_modules": "all"})
    kw.update(cfg.get("kw", {}))
    kw["policy_kwargs"] = {**kw["policy_kwargs"], **cfg.get("pk", {})}
    agent = Exp(env=env, seed=cfg.get("seed", 0), knobs=cfg.get("knobs", {}), device=dev, **kw)
    agent.learn(iters * kw["images_per_iteration"] * 10)
    prompts = [FIRST_TASKS["DPOK-Shapes-v0"]["prompts"]] * cfg.get("n_eval", 256)
    e = evaluate(agent.policy, env, prompts, seed=1000)
    from dpok_gym.prompts import load_prompts
    from dpok_gym.shapes.prompts import unseen_prompts
    un = list(unseen_prompts(load_prompts(FIRST_TASKS["DPOK-Shapes-v0"]["prompts"])))
    from agents.common.evaluation import cycle_prompts
    u = evaluate(agent.policy, env, cycle_prompts(un, 128), seed=5000)
    skl = e.step_kl.mean(0)
    h = agent.history
    return dict(cfg=cfg, aligned=e.aligned_share, quality=e.mean_quality, reward=e.mean_reward, step_kl=skl.tolist(), u_aligned=u.aligned_share, u_quality=u.mean_quality, history=h, seconds=time.time()-t0)

if __name__ == "__main__":
    cfg = json.loads(sys.argv[1])
    out = sys.argv[2]
    try:
        r = run(cfg)
    except Exception as ex:
        import traceback; traceback.print_exc(); r = dict(cfg=cfg, error=repr(ex))
    with open(out, "a") as f: f.write(json.dumps(r) + "\n")
