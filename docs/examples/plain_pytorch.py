"""A training loop of one's own, with phases: `tppo profile -- python docs/examples/plain_pytorch.py`.

Run without `tppo profile` it trains just the same and records nothing.
"""

import torch

from profiling.markers import phase

STEPS = 5


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = torch.nn.Linear(512, 512, device=device)
    optimizer = torch.optim.AdamW(policy.parameters())
    for step in range(1, STEPS + 1):
        with phase("rollout", step), torch.no_grad():
            states = [torch.randn(256, 512, device=device)]
            for _ in range(40):
                states.append(torch.tanh(policy(states[-1])))
        with phase("reward", step):
            rewards = torch.stack([state.mean() for state in states])
            baseline = (
                rewards.mean().item()
            )  # .item() waits for the GPU: what belongs to the phase is over when it ends
        with phase("update_policy", step):
            loss = sum((policy(state).mean() - baseline) ** 2 for state in states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
