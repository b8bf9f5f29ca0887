"""Everything with a model in it: the step, the loop, evaluation and export."""
