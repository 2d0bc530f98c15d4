// Entry point: per-thread data and the registration of every file's functions.
#include "addon.h"
#include <sys/mman.h>

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  Env *data = new Env();
  data->env = env;
  // When the thread's environment ends: threads first, they may still write to guest memory.
  napi_add_env_cleanup_hook(
      env,
      [](void *p) {
        Env *e = static_cast<Env *>(p);
        if (e->pool) poolDestroy(e->pool);
        e->pool = nullptr;
        for (Env::View &view : e->views) napi_delete_reference(e->env, view.ref);
        e->views.clear();
      },
      data);
  // Buffers over the arena die with the environment, after the hooks; its memory goes last.
  napi_set_instance_data(
      env, data,
      [](napi_env, void *p, void *) {
        Env *e = static_cast<Env *>(p);
        if (e->arena) munmap(e->arena, e->arenaBytes);
        delete e;
      },
      nullptr);
  initRegion(env, exports, data);
  initSocket(env, exports, data);
  initWait(env, exports, data);
  initFsops(env, exports, data);
  initIo(env, exports, data);
  initHandle(env, exports, data);
  initOffload(env, exports, data);
  initWatch(env, exports, data);
  initProcess(env, exports, data);
  initKeeper(env, exports, data);
  return exports;
}

NODE_API_MODULE(NODE_GYP_MODULE_NAME, Init)
