"""The parts that the algorithms share: policy, rollouts, buffer, losses, randomness, evaluation, saving."""
