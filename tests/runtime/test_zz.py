import time
def test_x(train, tmp_path):
    from tests.runtime.tiny import save_config, dummy_job, save_data, save_model, real_job
    m = save_config(tmp_path/"m")
    for w in (1,2,4):
        t=time.time()
        run = train(dummy_job(m, tmp_path/f"r{w}", gpus=w, lora__dropout=0.1))
        print(w, time.time()-t)
    d = save_data(tmp_path/"d.jsonl")
    mm = save_model(tmp_path/"mm")
    t=time.time()
    run = train(real_job(mm, d, tmp_path/"real", gpus=2, seq_len=48))
    print(time.time()-t, run.result())
