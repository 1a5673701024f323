import sys, json, os, random, io, contextlib, shutil
os.environ.update(RANK="0",LOCAL_RANK="0",WORLD_SIZE="1",LOCAL_WORLD_SIZE="1",MASTER_ADDR="127.0.0.1",MASTER_PORT=str(random.randint(20000,50000)))
import deepspeed
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from pathlib import Path
from tests import small_job
from zero_sft import train as job
f=Path("/tmp/start/job"); m=f/"model"
def variant(name, change):
    d=f/name; shutil.rmtree(d,ignore_errors=True); shutil.copytree(m,d); change(d); return d
lfs=b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"
def adapter(d):
    for p in d.glob("*"): p.unlink()
    (d/"adapter_config.json").write_text('{"base_model_name_or_path":"org/base"}')
cases={
 "attn":dict(attn_implementation="spda"),
 "flash":dict(attn_implementation="flash_attention_2"),
 "report":dict(report_to="tensorboard"),
 "bs":dict(deepspeed='{"zero_optimization":{"stage":3},"train_batch_size":4,"optimizer":{"type":"AdamW","params":{"lr":0.1}}}'),
 "mics":dict(deepspeed='{"zero_optimization":{"stage":3,"mics_shard_size":2}}'),
 "force":dict(deepspeed='{"zero_optimization":{"stage":3,"offload_optimizer":{"device":"cpu"}},"zero_force_ds_cpu_optimizer":true}',optim="sgd"),
 "adapter":dict(model_name_or_path=variant("adapter",adapter)),
 "lfs":dict(model_name_or_path=variant("lfs",lambda d:(d/"model.safetensors").write_bytes(lfs))),
 "lfstok":dict(model_name_or_path=variant("lfstok",lambda d:(d/"tokenizer.json").write_bytes(lfs))),
 "rope":dict(rope_parameters='{"rope_type":"linear","factor":2.0}',model_max_length=4096),
 "dtype":dict(dtype="float32",bf16=True),
 "steps":dict(deepspeed='{"zero_optimization":{"stage":3},"scheduler":{"type":"WarmupDecayLR","params":{"total_num_steps":99,"warmup_num_steps":"auto"}}}',lr_scheduler_type=None),
 "good": dict(deepspeed='{"zero_optimization":{"stage":3,"offload_optimizer":{"device":"cpu"}},"scheduler":{"type":"WarmupDecayLR","params":{"total_num_steps":"auto"}}}',optim="sgd",lr_scheduler_type=None,num_train_epochs=1),
}
for name,c in cases.items():
    given={"model_name_or_path": m, "data_path": f/"data.json", "output_dir": f/("x-"+name), "save_strategy":"no","logging_steps":1,"learning_rate":0.001,"lr_scheduler_type":"constant","bf16":False,"seed":3,"per_device_train_batch_size":2,"packing":False,"overwrite_output_dir":True,**c}
    err=io.StringIO()
    with contextlib.redirect_stderr(err):
        try: st=job.main([w for k,v in given.items() if v is not None for w in (f"--{k}",str(v))])
        except BaseException as e: st=f"RAISED {type(e).__name__} {e}"
    t=err.getvalue(); i=t.find("error:")
    print("RESULT",name,st,t[i:i+700] if i>=0 else "", "data:" in t and "training data" in t, flush=True)
h=small_job.history(f,"x-good"); print("RESULT lrs",[(round(e['learning_rate'],6),e['step']) for e in h if 'learning_rate' in e])
