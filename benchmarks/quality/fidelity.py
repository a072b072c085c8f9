"""How far next-token distributions are from dense ones on the same text."""

import torch


def divergence(dense: torch.Tensor, other: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Compares distributions place by place.

    Args:
        dense, other: logits [places, V], any float dtype.

    Returns:
        KL(dense || other) in nats, and whether both have the same most likely token, of each place.
    """
    log_p, log_q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl.tolist(), (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
