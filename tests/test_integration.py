"""The callbacks among what a Learner may be made of

Normalised batches, bfloat16, compiled, frozen, dropped out, distributed.
"""
import copy, warnings
import pytest, torch, torch.distributed as dist
from torch import nn, Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from safetensors import safe_open
from safetensors.torch import load_file
from fastai.vision.all import (
    BnFreeze, Callback, CancelFitException, CastToTensor, Learner, SGD, TensorImage, accuracy, set_seed)
from adverfine.threat import pixel_space, PixelModel
from adverfine.networks.zoo import cnn8
from adverfine.networks.modes import bare
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import FGSM, PGD
from adverfine.compression.pruning import StructuredPruning
from adverfine.attacks.scoring import score
from adverfine.evaluation.robustness import evaluate
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.training.acceleration import BF16
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.selection import KeepMostRobust, StopOnCatastrophe
import adverfine.compression.quantization, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner
from processes import gathered, two_processes

attack = PGD(.1, steps=3)

def _learner(path, net=None, data={}, **kw):
    set_seed(0)
    kw = {'metrics': [accuracy, RobustAccuracy(attack)], **kw}
    return Learner(digits_dls(n_train=256, **data), net() if net else cnn8(size=8), path=path, **kw)

def _fit(learn, n=1, lr=2e-3, cbs=(), train=attack):
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=[AdversarialTraining(train), *cbs])
    return learn

def _state(learn): return {k: v.detach().cpu().clone() for k,v in bare(learn.model).state_dict().items()}
def _same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def _bn_net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
def _dropout_net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(128, 10))

class Calls(Callback):
    "Notes at each call of `module` whether it trained, and the type of what came out"
    def __init__(self, module): self.module,self.seen = module,[]
    def note(self, module, x, out): self.seen.append((module.training, out.dtype))
    def before_fit(self): self.hook = self.module.register_forward_hook(self.note)
    def after_fit(self): self.hook.remove()

class At(Callback):
    "Does something after an epoch, once everything else has been done"
    order = 90
    def __init__(self, epoch, act): self.at,self.act = epoch,act
    def after_epoch(self):
        if self.epoch==self.at: self.act(self.learn)

class Sabotage(Callback):
    "Turns the head round before the validation of one epoch: what was right is wrong"
    def __init__(self, *epochs): self.epochs = epochs
    def before_validate(self):
        if self.epoch in self.epochs:
            head = bare(self.model)[-1]
            with torch.no_grad():
                head.weight.neg_()
                head.bias.neg_()

# --- what a Learner is made of

def test_normalised_batches(tmp_path):
    "Normalised batches, or the normalisation as the first layer: the same training and the same figures"
    l2 = PGD(.8, steps=3, norm='l2')
    kw = dict(opt_func=SGD, metrics=RobustAccuracy(l2))
    outside = _learner(tmp_path, data=dict(normalize=(.3,.4)), **kw)
    inside  = _learner(tmp_path, **kw)
    inside.model = PixelModel(inside.model, pixel_space(outside.dls))
    start = _state(outside)
    for learn in (outside, inside): _fit(learn, 2, 1e-2, train=l2)
    a,b = outside.model.state_dict(),inside.model.model.state_dict()
    for k in a: assert (a[k]-b[k]).norm() < .02*(a[k]-start[k]).norm(), k
    assert abs(outside.final_record[2]-inside.final_record[2]) < .05

def test_tensor_image_batches(tmp_path):
    "A `TensorImage` in the Learner trains and measures as a plain tensor does; what is adversarial is a plain tensor"
    learns = [_learner(tmp_path) for _ in range(2)]
    learns[1].remove_cbs(CastToTensor)
    types = [[], []]
    class Types(Callback):
        def __init__(self, order): self.order = order
        def before_batch(self):
            if self.training: types[self.order>20].append(type(self.xb[0]))
    _fit(learns[0])
    _fit(learns[1], cbs=[Types(19), Types(21)])
    assert all(issubclass(o, TensorImage) for o in types[0]) and set(types[1])=={Tensor}
    assert _same(*map(_state, learns)) and learns[0].final_record[2:]==learns[1].final_record[2:]
    x,y = learns[0].dls.valid.one_batch()
    a,b = (attack(learns[0].model, o, y, torch.Generator().manual_seed(0)) for o in (x, x.as_subclass(Tensor)))
    assert isinstance(x, TensorImage) and type(a) is Tensor and torch.equal(a, b)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_cuda(tmp_path):
    data = dict(normalize=(.5,.5), device=torch.device('cuda'))
    learn = _learner(tmp_path, data=data, metrics=RobustAccuracy(attack, n=20))
    keep = KeepMostRobust()
    _fit(learn, 3, cbs=[keep, StopOnCatastrophe(), Sabotage(2)])
    assert {p.device.type for p in learn.model.parameters()}=={'cuda'} and keep.gap>0
    assert _same(_state(learn), load_file(tmp_path/'models'/'best_robust.safetensors'))
    with learn.no_bar(): assert learn.validate()[1]==keep.best

def test_bf16(tmp_path):
    "All calls are in bfloat16, those of the crafting too; weights, kept weights and the session are not"
    learn = _learner(tmp_path)
    calls,keep = Calls(learn.model[0]),KeepMostRobust()
    cbs = [AdversarialTraining(attack), calls, BF16(), keep, StopOnCatastrophe()]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 2e-3, cbs=cbs)
    assert {o for _,o in calls.seen}=={torch.bfloat16} and {t for t,_ in calls.seen}=={True, False}
    best = load_file(tmp_path/'models'/'best_robust.safetensors')
    assert {v.dtype for v in best.values()}=={torch.float32}=={p.dtype for p in learn.model.parameters()}
    assert not torch.is_autocast_enabled('cpu') and not learn.model._forward_hooks

def test_compiled(tmp_path):
    "A compiled network: the same images, the same training, and weights that the network itself can read"
    plain,compiled = _learner(tmp_path/'a', net=_bn_net),_learner(tmp_path/'b', net=_bn_net)
    compiled.model = torch.compile(compiled.model, backend='aot_eager')
    compiled.model.train()
    bare(compiled.model)[1].eval()
    x,y = plain.dls.valid.one_batch()
    a,b = (attack(o.model, x, y, torch.Generator().manual_seed(0)) for o in (plain, compiled))
    assert (a-b).abs().max() < 1e-5
    assert [m.training for m in bare(compiled.model)]==[True, False, True, True, True]
    assert all(p.requires_grad and p.grad is None for p in compiled.model.parameters())
    for learn in (plain, compiled): _fit(learn, 2, cbs=[KeepMostRobust(), StopOnCatastrophe()])
    a,b = _state(plain),_state(compiled)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-3)
    assert abs(plain.final_record[3]-compiled.final_record[3]) < .05
    plain.model.load_state_dict(load_file(tmp_path/'b/models'/'best_robust.safetensors'))

def test_frozen_batchnorm(tmp_path):
    "Frozen, it stays frozen; thawed, it learns from the training's calls and from none of the crafting's"
    learn = _learner(tmp_path, net=_bn_net, metrics=RobustAccuracy(attack), cbs=BnFreeze)
    bn = learn.model[1]
    for p in bn.parameters(): p.requires_grad_(False)
    calls = Calls(bn)
    before = {k: v.clone() for k,v in bn.state_dict().items()}
    _fit(learn, cbs=[calls, StopOnCatastrophe()])
    assert not any(t for t,_ in calls.seen) and _same(before, bn.state_dict())
    assert not any(p.requires_grad for p in bn.parameters())

    learn = _learner(tmp_path, net=_bn_net)
    calls = Calls(learn.model[1])
    _fit(learn, cbs=[calls])
    steps,trained = len(learn.dls.train),sum(t for t,_ in calls.seen)
    assert trained==steps==learn.model[1].num_batches_tracked and len(calls.seen)>=4*steps

def test_dropout(tmp_path):
    "Off while crafting, so the attack is the same each time; on while training"
    learn = _learner(tmp_path, net=_dropout_net, metrics=[])
    calls = Calls(learn.model[2])
    _fit(learn, cbs=[calls])
    n,valid = len(learn.dls.train),len(learn.dls.valid)
    assert [t for t,_ in calls.seen]==[False, False, False, True]*n + [False]*valid
    learn.model.train()
    x,y = learn.dls.valid.one_batch()
    a,b = (attack(learn.model, x, y, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and learn.model[2].training

# --- DDP

def _is_kept(grad, before):
    "`before` is what `grad` was, False where there was none"
    if before is False: return grad is None
    return torch.equal(grad, before)

def _rank(rank, path):
    both = lambda o: gathered(torch.as_tensor(o, dtype=torch.float32))
    set_seed(0)
    net = _bn_net()
    alone,ddp = copy.deepcopy(net),DistributedDataParallel(net)
    reduced = []
    def hook(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)
    ddp.register_comm_hook(None, hook)
    x,y = (o.as_subclass(Tensor) for o in digits_dls(seed=rank).train.one_batch())

    def step():
        ddp.zero_grad(); alone.zero_grad()
        for m in (ddp, alone): nn.functional.cross_entropy(m(x), y).backward()
        ours = torch.cat([p.grad.flatten() for p in net.parameters()])
        mean = torch.stack(both(torch.cat([p.grad.flatten() for p in alone.parameters()]))).mean(0)
        torch.testing.assert_close(ours, mean, rtol=1e-3, atol=1e-5)

    for turn in range(3):
        done = len(reduced)
        grads = [p.grad is not None and p.grad.clone() for p in net.parameters()]
        if turn%2==rank: attack(ddp, x, y)        # the other process does not take part in the crafting
        assert len(reduced)==done
        assert all(_is_kept(p.grad, g) for p,g in zip(net.parameters(), grads))
        assert ddp.training and 'forward' not in vars(ddp)
        assert ddp.require_backward_grad_sync and ddp.require_forward_param_sync
        step()
        assert len(reduced)>done

    set_seed(rank)                                # other random starts in each process, as they would be
    dls = digits_dls(n_train=256, seed=rank)      # and other images
    learn = Learner(dls, ddp, path=path, metrics=RobustAccuracy(attack, n=20))
    keep = KeepMostRobust()
    cbs = [AdversarialTraining(attack), keep, StopOnCatastrophe(threshold=1), Sabotage(2)]
    done = len(reduced)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 2e-3, cbs=cbs)
    assert len(reduced)-done==3*len(dls.train)
    a,b = both(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(a, b)                      # one network, also after the best weights came back
    a,b = both([*(o[2] for o in learn.recorder.values), keep.best, keep.epoch_of_best])
    assert torch.equal(a, b) and keep.gap>0       # and one opinion of which weights those were
    still = PGD(.1, steps=3, random_start=False)
    learn.metrics = RobustAccuracy(still)
    with learn.no_bar(): share = learn.validate()[1]
    mine = score(net, still, *pixels(dls.valid)).robust
    assert abs(share-torch.stack(both(mine)).mean().item()) < 1e-6

@pytest.mark.skipif(not dist.is_available(), reason='torch without distributed')
def test_ddp(tmp_path): two_processes(_rank, tmp_path)

# --- RobustAccuracy of a sample

def test_sample_is_fixed_and_free(tmp_path):
    "The same images in each validation, others with another seed; the training does not notice"
    metrics = dict(none=[], all=RobustAccuracy(attack), n=RobustAccuracy(attack, n=10))
    learns = {k: _learner(tmp_path, metrics=m) for k,m in metrics.items()}
    states = [_state(_fit(learn, 2)) for learn in learns.values()]
    assert all(_same(states[0], o) for o in states)
    learn = learns['n']
    metric = learn.metrics[0]
    with learn.no_bar(): a,b = (learn.validate()[1] for _ in range(2))
    assert a==b and metric.count==10 and metric.drawn.sum()==10
    with learn.no_bar():
        drawn,metric.seed = metric.drawn,1
        learn.validate()
    assert metric.drawn.sum()==10 and not torch.equal(drawn, metric.drawn)

def test_sample_over_several_batches(tmp_path):
    "Small batches or one big one: the same images are drawn; all of them is the whole figure"
    learn = _fit(_learner(tmp_path), 2)
    still = PGD(.1, steps=3, random_start=False)
    x,y = pixels(learn.dls.valid)
    for n in (1, 7, len(x), None):
        figures = []
        for bs in (4, len(x)):
            metric = RobustAccuracy(still, n=n)
            learn.metrics = metric
            with learn.no_bar(): figures.append(learn.validate(dl=learn.dls.valid.new(bs=bs))[1])
        some = metric.drawn if n else slice(None)
        report = evaluate(learn.model, x[some], y[some], still, progress=False)
        assert figures[0]==figures[1]==pytest.approx(report.robust)

def test_sample_must_be_there(tmp_path):
    with pytest.raises(ValueError, match='n=0'): RobustAccuracy(attack, n=0)
    learn = _learner(tmp_path, metrics=RobustAccuracy(attack, n=27))
    with learn.no_bar(), pytest.raises(ValueError, match='n=27, but there are 26'): learn.validate()
    assert RobustAccuracy(attack, seed=3).seed==3

# --- KeepMostRobust

@pytest.mark.parametrize('end', ['fit', 'cancel', 'error'])
def test_best_comes_back(tmp_path, end):
    "Best weights at the end of a fit, also of a cancelled one; an error leaves the network as it was, the file whole"
    learn = _learner(tmp_path, net=_bn_net)
    learn.quantize(4)
    keep = KeepMostRobust('the_best')
    def finish(learn):
        if end=='cancel': raise CancelFitException()
        if end=='error': raise KeyError('trouble')
    states = []
    notes = [At(i, lambda o: states.append(_state(o))) for i in range(4)]
    fit = lambda: _fit(learn, 4, 5e-3, cbs=[keep, Sabotage(2), *notes, At(2, finish)])
    if end=='error':
        with pytest.raises(KeyError, match='trouble'): fit()
    else: fit()
    robust = [o[3] for o in learn.recorder.values]
    assert keep.best==robust[keep.epoch_of_best]==max(robust) and keep.last==robust[-1] and len(set(robust[:2]))==2
    assert keep.gap==keep.best-keep.last and (end=='fit' or keep.gap>0)
    assert _same(_state(learn), states[-1] if end=='error' else states[keep.epoch_of_best])
    if end!='error':
        with learn.no_bar(): assert learn.validate()[2]==keep.best
    with safe_open(tmp_path/'models/the_best.safetensors', 'pt') as f: metadata = f.metadata()
    assert metadata==dict(epoch=str(keep.epoch_of_best), robust_accuracy=str(keep.best))
    assert [o.name for o in (tmp_path/'models').iterdir()]==['the_best.safetensors']
    assert keep not in learn.cbs

def test_best_after_pruning(tmp_path):
    "Weights from before a cut fit no more: the best of those that do comes back"
    learn,keep = _learner(tmp_path),KeepMostRobust()
    shapes = []
    class Shapes(Callback):
        def after_epoch(self): shapes.append(self.model[0].weight.shape[0])
    _fit(learn, 3, cbs=[StructuredPruning(.5), keep, Shapes(), Sabotage(1, 2)])
    assert len(set(shapes))==3 and keep.epoch_of_best==2 and keep.gap==0
    assert _same(_state(learn), load_file(tmp_path/'models/best_robust.safetensors'))

def test_only_trained_epochs_count(tmp_path):
    "With callbacks on the Learner, `validate`, `lr_find`, `get_preds` and skipped epochs are no best, no catastrophe"
    keep,guard = KeepMostRobust(),StopOnCatastrophe(attack)
    learn = _learner(tmp_path, cbs=[keep, guard])
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.validate()
        _fit(learn, 2)
        best,epoch = keep.best,keep.epoch_of_best
        with torch.no_grad(): learn.model[-1].weight.neg_()
        learn.validate()
        learn.validate(ds_idx=0)
        learn.get_preds()
        learn.lr_find(show_plot=False, num_it=3)
        assert (keep.best, keep.epoch_of_best)==(best, epoch)
        with learn.no_logging(): learn.fit(3, 1e-3, start_epoch=2)
    assert keep.epoch_of_best==2

def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.head = nn.Linear(64, 64),nn.Linear(64, 64),nn.Linear(64, 10)
            self.b.weight = self.a.weight
        def forward(self, x): return self.head(self.b(self.a(x.flatten(1)).relu()).relu())
    learn = _fit(_learner(tmp_path, net=Tied), 2, cbs=[KeepMostRobust()])
    assert learn.model.a.weight is learn.model.b.weight
    assert _same(_state(learn), load_file(tmp_path/'models/best_robust.safetensors'))

# --- StopOnCatastrophe

def test_guard_goes_back_one_epoch(tmp_path):
    learn,before = _learner(tmp_path),{}
    guard = StopOnCatastrophe()
    with pytest.warns(UserWarning, match=r'in epoch 4: accuracy under PGD-10 fell from 0\.\d+ to 0\.\d+.*N-FGSM'):
        _fit(learn, 8, cbs=[guard, At(3, lambda o: before.update(_state(o))), Sabotage(4)])
    assert guard.metric.attack==PGD(.1, steps=10) and guard.threshold==.2
    assert len(learn.recorder.values)==5 and _same(_state(learn), before) and guard not in learn.cbs

def test_guard_may_only_warn(tmp_path):
    learn = _learner(tmp_path)
    with pytest.warns(UserWarning, match='in epoch 4') as caught:
        _fit(learn, 6, cbs=[StopOnCatastrophe(stop=False), Sabotage(4)])
    assert len(learn.recorder.values)==6 and len(caught)==1

def test_guard_takes_the_threat_of_the_training(tmp_path):
    learn,guard = _learner(tmp_path),StopOnCatastrophe()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[AdversarialTraining(FGSM(.3, norm='l2', clamp=False)), guard])
        assert guard.metric.attack==PGD(.3, steps=10, norm='l2', clamp=False)
        with pytest.raises(ValueError, match='no AdversarialTraining'): learn.fit(1, cbs=StopOnCatastrophe())
        learn.fit(1, 1e-3, cbs=(other := StopOnCatastrophe(PGD(.05))))
    assert other.metric.attack==PGD(.05)

def test_a_cut_is_no_catastrophe(tmp_path):
    guard = StopOnCatastrophe(threshold=.05)
    shares = []
    notes = [At(i, lambda o: shares.append(guard.last)) for i in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        _fit(_learner(tmp_path), 5, 5e-3, cbs=[StructuredPruning(.5), guard, Sabotage(4), *notes])
    assert len(shares)==5 and shares[3]-shares[4]>.05

def test_guards_do_not_disturb(tmp_path):
    "The same training with and without them, and together they hand back the best"
    plain,guarded = _learner(tmp_path),_learner(tmp_path)
    _fit(plain, 2)
    states = []
    _fit(guarded, 2, cbs=[KeepMostRobust(), StopOnCatastrophe(), At(1, lambda o: states.append(_state(o)))])
    assert _same(states[0], _state(plain))
    learn,keep = _learner(tmp_path),KeepMostRobust()
    with pytest.warns(UserWarning, match='catastrophic'): _fit(learn, 8, cbs=[StopOnCatastrophe(), keep, Sabotage(4)])
    with learn.no_bar(): assert learn.validate()[2]==keep.best and keep.gap>.2
