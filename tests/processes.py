"Two gloo processes for a test, whose threads end before Python does"
import datetime, gc, os, weakref
import torch, torch.distributed as dist

def two_processes(f, path):
    "Call `f(rank, path)` in two new processes that form a process group; `path` must be a new folder"
    torch.multiprocessing.spawn(_process, args=(f, str(path)), nprocs=2)

def _process(rank, f, path):
    import torch.distributed.nn.functional   # its functions keep the group that exists when it is imported: none yet
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=20))
    group = weakref.ref(dist.group.WORLD)
    f(rank, path)
    # gloo's worker threads drop what a collective held, some of it Python objects, and need the GIL for that. One that
    # asks for the GIL while Python shuts down is ended inside a destructor, and C++ calls `terminate` (pytorch issue
    # 190489). The destructor of the group joins these threads, but runs only when nothing holds the group any more,
    # and a DDP wrapper does that is part of a reference cycle (a Learner's).
    dist.destroy_process_group()
    gc.collect()
    assert group() is None, 'something keeps the process group and its threads alive until Python shuts down'

def gathered(t):
    "The tensors `t` of both processes"
    out = [torch.zeros_like(t) for _ in range(2)]
    dist.all_gather(out, t)
    return out
