"""Students that teach the next student, one after another, as one call that can be resumed."""

from hf_distill.chain.link import Link
from hf_distill.chain.result import ChainResult, LinkResult
from hf_distill.chain.run import Chain

__all__ = ["Chain", "ChainResult", "Link", "LinkResult"]
