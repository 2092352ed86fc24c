"The fastest form: what it computes, what it leaves alone, what is remembered, and who stays as it is"
import copy, json, os, subprocess, sys
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.learner import Learner
import fastai.callback.progress  # noqa: F401 verbs of a Learner
from adverfine.networks import fastest as room, timings
from adverfine.networks.fastest import Faster, fastest
from adverfine.networks.modes import frozen
from adverfine.networks.precision import in_bf16
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.data.images import image_dls
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.compression.quantization import quantize
from adverfine.training import acceleration
from adverfine.training.acceleration import BF16, trains_faster_in_bf16
from adverfine.study import study as study_module
from adverfine.study.protocol import FineTune, Judge
from adverfine.study.study import Study

forms = 'as it is', 'channels_last', 'fused', 'bf16', 'fused bf16'

@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    "Nothing is remembered, and the user's cache is left alone"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('ADVERFINE_FASTEST', raising=False)
    monkeypatch.setattr(timings, '_known', {})
    torch.manual_seed(0)
    return tmp_path/'adverfine'/'fastest.json'

@pytest.fixture
def timed(monkeypatch):
    "Seconds of each form, in place of what a clock would say, and how often it was asked"
    seconds,calls = dict.fromkeys(forms, 1.),[]
    def times(made, x):
        calls.append(list(made))
        return {name: seconds[name] for name in made}
    monkeypatch.setattr(room, '_times', times)
    monkeypatch.setattr(room, 'bf16_is_fast', lambda device: True)
    return seconds,calls

def _small(): return cnn8(size=8),torch.rand(16, 1, 8, 8)

def _input_gradient(m, x):
    z = x.clone().requires_grad_()
    with frozen(m): return torch.autograd.grad(m(z).float().logsumexp(1).sum(), z)[0]

def _bn_resnet():
    net,x = resnet18_cifar(),torch.rand(4, 3, 16, 16)
    for _ in range(3): net(x)
    return net,x

@pytest.mark.parametrize('make', [_small, _bn_resnet])
@pytest.mark.parametrize('name', forms)
def test_forms_compute_what_the_network_does(make, name, monkeypatch):
    net,x = make()
    net.train()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    strides,state = [p.stride() for p in net.parameters()],torch.get_rng_state()
    monkeypatch.setenv('ADVERFINE_FASTEST', name)
    fast = fastest(net, x)
    if fast.name!=name: pytest.skip(f'{name} cannot be had on this processor')
    assert isinstance(fast, Faster) and fast.bf16==('bf16' in name) and repr(fast)==f'Faster({name!r})'

    assert net.training and all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())
    assert [p.stride() for p in net.parameters()]==strides and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

    gradient = _input_gradient(net, x)
    with torch.no_grad(): logits,right = fast(x),net.eval()(x)
    assert logits.dtype==torch.float32
    if fast.bf16:
        assert (logits-right).abs().max() < .05*right.abs().max()
        assert nn.functional.cosine_similarity(_input_gradient(fast, x).flatten(), gradient.flatten(), 0)>.9
    else:
        assert torch.equal(logits.argmax(1), right.argmax(1))
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_input_gradient(fast, x), gradient, rtol=1e-3, atol=1e-5)

    with torch.no_grad():           # weights are those of then, whatever becomes of the network
        for p in net.parameters(): p.zero_()
    assert torch.equal(fast(x), logits) or fast.bf16 and torch.allclose(fast(x), logits)

@pytest.mark.parametrize('bits', [4, 1])
def test_a_network_that_rounds_is_never_rounded_otherwise(bits, timed):
    seconds,calls = timed
    net,x = _small()
    quantize(net, bits, [x])
    seconds['fused'] = .5
    fast = fastest(net, x)
    assert calls==[['fused', 'channels_last', 'as it is']] and fast.name=='fused' and not fast.bf16
    with torch.no_grad(): assert torch.equal(fast(x).argmax(1), net.eval()(x).argmax(1))
    assert fastest(net, x, bf16=True).bf16      # unless one insists

def test_bf16_has_to_be_worth_it(timed, monkeypatch):
    seconds,calls = timed
    net,x = _small()
    seconds |= {'channels_last': .8, 'bf16': .75, 'fused bf16': 9.}
    assert fastest(net, x).name=='channels_last'
    timings._known.clear()
    timings._file().unlink()
    seconds['bf16'] = .6
    assert fastest(net, x).name=='bf16'
    assert fastest(net, x, bf16=False).name=='channels_last'
    monkeypatch.setattr(room, 'bf16_is_fast', lambda device: False)
    assert fastest(net, x).name=='channels_last' and 'bf16' not in str(calls[-1])

def test_it_is_timed_once(timed, fresh):
    seconds,calls = timed
    net,x = _small()
    seconds['channels_last'] = .1
    assert [fastest(net, x, bf16=False).name for _ in range(3)]==['channels_last']*3 and len(calls)==1
    assert fastest(cnn8(size=8), torch.rand_like(x), bf16=False).name=='channels_last' and len(calls)==1   # of its kind
    seconds['fused'] = .01
    timings._known.clear()                         # another process
    assert fastest(net, x, bf16=False).name=='channels_last' and len(calls)==1
    others = (net, x[:3]), (nn.Sequential(net, nn.Identity()), x)
    assert [fastest(*o, bf16=False).name for o in others]==['fused']*2 and len(calls)==3
    assert len(json.loads(fresh.read_text()))==3

@pytest.mark.parametrize('content', [
    '', 'no JSON', '[1]', '{"KEY": 3}', '{"KEY": {}}', '{"KEY": {"fused": "fast"}}', '{"KEY": {"fused": NaN}}',
    '{"KEY": {"fused": -1.0}}', '{"KEY": {"eval": 1.0}}', b'\xff\xfe', '['*100_000])
def test_a_damaged_file_does_no_harm(content, timed, fresh):
    _,calls = timed
    net,x = _small()
    names = room._candidates(net, x, False)
    fresh.parent.mkdir()
    if isinstance(content, str): content = content.replace('KEY', timings.key_of(net, x, names)).encode()
    fresh.write_bytes(content)
    fastest(net, x, bf16=False)
    assert len(calls)==1 and set(json.loads(fresh.read_text()))=={timings.key_of(net, x, names)}

def test_a_file_that_cannot_be_written_does_no_harm(timed, fresh):
    net,x = _small()
    fresh.parent.write_text('a file where the folder should be')
    assert fastest(net, x).name in forms and fastest(net, x).name in forms and len(timed[1])==1

def test_the_file_does_not_grow_for_ever(fresh):
    for k in range(3): timings.remember(f'new{k}', dict(fused=1.))
    timings.write_atomic(fresh, json.dumps({str(k): dict(fused=1.) for k in range(5000)}))
    timings.remember('last', dict(fused=2.))
    kept = json.loads(fresh.read_text())
    assert len(kept)==1000 and kept['last']==dict(fused=2.) and '0' not in kept

def test_slow_networks_run_a_few_times_only(monkeypatch):
    "Eight passes of the slowest at most, and those that cannot win run once"
    now,passes = [0.],[]
    cost = {'as it is': 10., 'channels_last': 9., 'fused': 8., 'bf16': 30., 'fused bf16': 8.5}
    def seconds(name, x):
        passes.append(name)
        now[0] += cost[name]
        return cost[name]
    monkeypatch.setattr(timings, '_seconds', seconds)
    monkeypatch.setattr(timings.time, 'perf_counter', lambda: now[0])
    assert timings.best_times({name: name for name in forms}, None)==cost
    assert len(passes)==8 and passes.count('bf16')==1
    passes.clear()
    cost = {name: o/10_000 for name,o in cost.items()}      # of a fast network the warm-up does not count
    timings.best_times({name: name for name in forms}, None)
    assert passes.count('bf16')==2 and passes.count('fused')==7

class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
    def forward(self, x): return (self.conv(x) if x.mean()>0 else x).mean((2,3))

class Uncopied(Choosy):
    def __deepcopy__(self, memo): raise TypeError("there is one of me")

class Rounded(Choosy):
    "Without a gradient"
    def forward(self, x): return self.conv(x).mean((2,3)).detach()

def test_who_stays_as_it_is(recwarn):
    net,x = _small()
    hooked,backward,replaced,compiled,within = (copy.deepcopy(net) for _ in range(5))
    hooked[1].register_forward_hook(lambda m, i, o: o*2)
    backward[2].register_full_backward_hook(lambda m, i, o: None)
    replaced.forward = lambda x: nn.Sequential.forward(replaced, x)*2
    compiled.compile()
    within[0].compile()
    def function(x): return net(x)
    stay = hooked, backward, replaced, compiled, within, torch.compile(net), function, Uncopied(), Rounded()
    for m in stay:
        fast = fastest(m, x)
        assert fast.name=='as it is' and fast.network is m and not fast.bf16
    for m in (hooked, backward, replaced): assert torch.equal(fastest(m, x)(x), m(x))
    assert fastest(net.double(), x.double()).name=='as it is'
    assert not [o for o in recwarn if 'crafted on as it is' in str(o.message)]

def test_random_numbers_are_those_that_would_have_come(timed):
    class Random(Choosy):
        def forward(self, x): return self.conv(x+torch.rand_like(x)).mean((2,3))
    net = Random()
    state = torch.get_rng_state()
    assert fastest(net, torch.zeros(4, 1, 8, 8)).name=='as it is' and torch.equal(torch.get_rng_state(), state)

def test_a_network_that_cannot_be_traced_has_other_forms(timed):
    timed[0]['channels_last'] = .1
    x = torch.rand(4, 1, 8, 8)
    net = Choosy()
    fast = fastest(net, x, bf16=False)
    assert fast.name=='channels_last' and timed[1]==[['channels_last', 'as it is']]
    torch.testing.assert_close(fast(-x), net(-x))

def test_a_form_that_says_something_else_is_not_used(timed):
    "As of a network that asks how its images lie in memory"
    class Looks(Choosy):
        def forward(self, x):
            flat = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            return self.conv(x).mean((2,3))*(2 if flat else 1)
    net = Looks()
    net.conv = nn.Conv2d(3, 8, 3)
    timed[0]['channels_last'] = .1
    assert fastest(net, torch.rand(4, 3, 8, 8), bf16=False).name!='channels_last'
    assert not any('channels_last' in names for names in timed[1])

def test_the_environment_has_the_last_word_but_one(timed, monkeypatch):
    net,x = _small()
    for name in forms:
        monkeypatch.setenv('ADVERFINE_FASTEST', name)
        assert fastest(net, x).name in (name, 'as it is')
        assert fastest(net, x, bf16='bf16' not in name).bf16==('bf16' not in name)  # an argument is the last
    assert all(len(o)!=1 for o in timed[1])     # no form is timed alone
    timed[1].clear()
    monkeypatch.setenv('ADVERFINE_FASTEST', 'untimed')
    assert fastest(net, x, bf16=False).name in ('fused', 'channels_last') and not timed[1]
    monkeypatch.setenv('ADVERFINE_FASTEST', 'eager')
    with pytest.raises(ValueError, match="ADVERFINE_FASTEST='eager' is no form of a network: use 'untimed' or one of"):
        fastest(net, x)

def test_within_no_grad_and_inference_mode():
    net,x = _small()
    for mode in torch.no_grad, torch.inference_mode:
        timings._known.clear()
        timings._file().unlink(missing_ok=True)
        with mode(): fast = fastest(net, x+0)
        assert _input_gradient(fast, x).any()

def test_another_process_chooses_alike(fresh):
    "By the file, without timing"
    code = '''
import torch
from adverfine.networks import fastest as room, timings
from adverfine.networks.zoo import cnn8
if {again}: room._times = None
print(room.fastest(cnn8(size=8), torch.rand(16, 1, 8, 8)).name)'''
    said = []
    for again in False, True:
        out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code.format(again=again)], capture_output=True,
                             text=True, env=dict(os.environ))
        assert not out.returncode, out.stderr
        said.append(out.stdout.strip())
    assert said[0]==said[1] and said[0] in forms

# --- the precision of training

class Trouble(Callback):
    "Before BF16 has seen a batch"
    order = -9
    def before_batch(self): raise RuntimeError('trouble')

@pytest.fixture
def steps(monkeypatch):
    "Seconds of a training step in each precision, in place of what a clock would say, and how often it was asked"
    seconds,calls = dict(float32=1., bf16=.5),[]
    def times(runs, x):
        calls.append(sorted(runs))
        for run in runs.values(): run()
        return dict(seconds)
    monkeypatch.setattr(acceleration, 'best_times', times)
    monkeypatch.setattr(acceleration, 'bf16_is_fast', lambda device: True)
    return seconds,calls

def test_bf16_trains_where_it_is_faster(steps, fresh, monkeypatch):
    seconds,calls = steps
    net,x = _small()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    state = torch.get_rng_state()
    assert trains_faster_in_bf16(net, x) and trains_faster_in_bf16(net, x) and calls==[['bf16', 'float32']]
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and all(p.grad is None and p.is_contiguous() for p in net.parameters())
    seconds['bf16'] = .9
    timings._known.clear()                                    # another process
    assert trains_faster_in_bf16(net, x) and len(calls)==1
    assert not trains_faster_in_bf16(net, x[:9]) and len(calls)==2      # less than 15 %
    for told,said in ('bf16', True), ('fused', False), ('untimed', True):
        monkeypatch.setenv('ADVERFINE_FASTEST', told)
        assert trains_faster_in_bf16(net, x[:9]) is said and len(calls)==2
    monkeypatch.delenv('ADVERFINE_FASTEST')
    monkeypatch.setattr(acceleration, 'bf16_is_fast', lambda device: False)
    assert not trains_faster_in_bf16(net, x) and len(calls)==2

def test_any_network_can_be_asked_for_its_precision(steps):
    net,x = _small()
    quantize(net, 4, [x])
    for o in net, Uncopied(), Choosy(), Rounded(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout()).eval():
        assert trains_faster_in_bf16(o, x)

def test_a_network_that_somebody_listens_to_is_not_copied(steps):
    "A copy of a hook may hold a copy of all that it knows, and what it notes would not be what is trained"
    net,x = _small()
    heard = []
    net[0].register_forward_hook(lambda m, i, o: heard.append(1))
    assert trains_faster_in_bf16(net, x) and not heard and not steps[1]

@pytest.mark.parametrize('if_faster', [True, False])
def test_a_learner_with_bf16_may_validate_before_it_is_fitted(steps, if_faster):
    learn = Learner(digits_dls(n_train=200, bs=64), cnn8(size=8), cbs=BF16(if_faster=if_faster))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.fit(1)
        learn.validate()
        with pytest.raises(RuntimeError, match='trouble'): learn.fit(1, cbs=Trouble())
        learn.validate()
    assert not in_bf16(learn.model) and 'forward' not in vars(learn.model)

@pytest.mark.parametrize('faster', [True, False])
def test_a_fit_takes_the_faster_precision(steps, faster):
    steps[0]['bf16'] = .5 if faster else 2.
    said = []
    class Said(Callback):
        def after_pred(self): said.append(in_bf16(self.model))
    learn = Learner(digits_dls(n_train=200, bs=64), cnn8(size=8), cbs=[BF16(if_faster=True), Said()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.fit(1)
    assert set(said)=={faster} and len(steps[1])==1 and not in_bf16(learn.model)

@pytest.mark.parametrize('faster', [True, False])
def test_a_study_settles_its_precision_once(steps, faster, tmp_path, monkeypatch):
    steps[0]['bf16'] = .5 if faster else 2.
    x,y = torch.rand(40, 3, 32, 32),torch.arange(40)%10
    dls = image_dls((x, y), (x, y), bs=8)
    def study(**kwargs):
        tunings = FineTune('none'),FineTune('standard')
        return Study(dls, 'resnet18_cifar', (), *tunings, Judge(PGD(.1)), out=tmp_path, **kwargs)
    first,second = study(),study()
    assert first.bf16 is None
    assert first.claim(dls).bf16 is faster and len(steps[1])==1
    monkeypatch.setattr(study_module, 'trains_faster_in_bf16', None)    # whoever comes later takes it from the folder
    assert second.claim(dls).bf16 is faster
    with pytest.raises(ValueError, match=f'bf16 is {faster} there and {not faster} here'):
        study(bf16=not faster).claim(dls)
