"""Weight sync: the learner's weights reach every engine in buckets, under a version, and what
arrived is checked.

The map of one publication. `trainer.publisher` drives it; the numbers give the order.

    learner (its exporter rank)                              every engine
    ---------------------------                              ------------
    0. Transport.init_info, connect  <------- once ------->  init_weight_sync
                                                         1.  start_weight_update
    2. Learner.weights               (stream, names)
    3. Transport.stage               (bucket, checksum)
    4. Transport.send                ---- the bytes ---->
    5. deliver(update_info)          ---- where they are ->  update_weights
    6. Transport.release             <---- all answered ---
                                                         7.  finish_weight_update(version) -> SyncReceipt
    8. verify_receipt                (verify)
    9. the log-prob probe, when due  (tolerance)

Steps 2 to 6 repeat for every bucket (`send.send_weights`). While the engines take one bucket, the learner
gathers and stages the next, so at most two buckets are alive. An engine that gets its buckets by broadcast
loads each one while the next arrives.

Which file has which verb:

- `names`: parameters of an HF model in memory -> the names and tensors of its model folder.
- `folder`: what a model folder holds, read from the heads of its safetensors files.
- `stream`: tensors -> buckets. `stacks`: many experts as one tensor on the way.
- `bucket`: named tensors laid end to end in one flat buffer. `checksum`: one number per tensor.
- `transport`: the protocols of both sides. `shm` implements them on one host, `collective` across hosts and
  between GPUs, over a process group (`group`: gloo or nccl). `source` makes the engine's side.
- `send`: the loop over buckets. `verify`: the verdicts. `export`: the same stream as an HF folder, read back;
  `shards` writes its files tensor by tensor.
- Colocated engines hear from a rank of their own host: every exporter sends the same stream, each to its
  engines (`actors.placement.Reservation.exporters`).
- The engine's side is in `rollout.vllm.receivers` (vLLM's MoE layers in `rollout.vllm.experts`) and
  `rollout.reference`. How the engines are reached is in `learners.group` (one process) and
  `actors.weight_link` (Ray), which also picks the transport.
"""
