"""Training: an objective, a jitted step, and a loop that survives what happens to long runs.

protocol    what the loop asks of an objective and of a stream of batches
optim       AdamW, schedules, what is decayed
steps       one update on the device: accumulation, clipping, moving average, metrics
loop        the list of once-in-a-whiles around the step; resume, preemption, divergence
checkpoint  Orbax behind one module          run_folder  the files of a run
tracker     where metrics go                 harness     the same as a notebook's experiment tracker
mesh        devices and who holds what       machine     what this machine multiplies per second
progress    what a person sees meanwhile
"""
