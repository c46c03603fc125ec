"""Whether calls are among the accepted ones: the rules of the metric `eval/metrics/ast_accuracy`, for one reply."""

from eval.metrics.ast_accuracy.ast_accuracy import accepts_call, accepts_calls

__all__ = ["accepts_call", "accepts_calls"]
