"""What each figure shows, in the words of page, Markdown and text alternatives."""

UNSUPPORTED = "Dashed and hatched: no run stands behind it; the budget, the size or the tokens were not trained."
CAPTIONS = {
    "difference": "Difference of the two frontiers with its 95 % band. Below zero the second family is better. "
    f"{UNSUPPORTED} Dotted: the band as the back-test would have it.",
    "axes": "The same difference on every cost axis that the table has, from the same draws.",
    "probability": "Share of bootstrap draws in which the second family has the lower loss.",
    "profile": "How much worse the joint law fits when the second family is made to overtake the first at a given "
    "compute; computes under the dashed line are compatible with the runs.",
    "break-even": "What one ternary operation may cost, in multiply-accumulate operations, for the second family to "
    "reach the first one's loss at the same price; with its 95 % band. Below zero no price is low enough.",
    "loss": "Held-out loss against training compute. Points: end-of-schedule runs; thin lines: fitted loss along each "
    f"size's token budgets; thick lines: best allocation at each compute, with 95 % band. {UNSUPPORTED} Faint: "
    "training curves.",
    "allocation": f"Best number of parameters and of tokens at each compute, with 95 % bands. {UNSUPPORTED}",
    "backtest": "What cheaper runs would have predicted for dearer ones: error over the raw 95 % half-width. Points "
    "above one were missed.",
    "residuals": "What each family's own fit leaves unexplained.",
}
