{
  "variables": { "asan%": 0 },
  "targets": [
    {
      "target_name": "addon",
      "sources": ["addon.cc", "region.cc", "socket.cc", "wait.cc", "fsops.cc", "io.cc", "handle.cc", "offload.cc", "watch.cc", "process.cc", "keeper.cc"],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": ["NAPI_VERSION=8", "NODE_ADDON_API_DISABLE_DEPRECATED", "_FILE_OFFSET_BITS=64", "_GNU_SOURCE"],
      "cflags": ["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"],
      "cflags_cc": ["-std=c++17", "-fno-exceptions", "-fno-rtti"],
      "cflags!": ["-fno-exceptions"],
      "ldflags": ["-Wl,-z,relro,-z,now"],
      "conditions": [
        ["asan==1", {
          "cflags": ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"],
          "ldflags": ["-fsanitize=address"]
        }, {
          "cflags": ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
        }]
      ]
    }
  ]
}
