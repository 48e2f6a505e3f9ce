"""What models are asked: texts to predict, and the tasks of the lm-evaluation-harness.

`base` says what a task is, `text` and `harness` are the two kinds, `data` finds what they read, `find` turns the names
of the command line into tasks.
"""
