"""`dpo-fast demo`: DPO that a laptop can show, with each of the four references, offline.

A small Llama learns the language of a quiz from right and wrong answers alike, so that it prefers
neither; then DPO teaches it to answer rightly. The pairs are shipped; neither the length of an
answer nor its words give away which one is right.
"""

from dpo_fast.demo.pipeline import run_demo

__all__ = ["run_demo"]
