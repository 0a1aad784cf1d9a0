// A tool that NVTX loads into a process (NVTX_INJECTION64_PATH): it writes ranges to the file named by NVTX_SEEN, one
// line each as it opens ("+domain:name") and closes ("-domain").
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include <nvtx3/nvToolsExt.h>

namespace {

std::FILE* seen = nullptr;

// Domains and registered strings are handed out as pointers to their text.
const char* text(const void* handle) { return static_cast<const std::string*>(handle)->c_str(); }

nvtxDomainHandle_t NVTX_API create(const char* name) {
    return reinterpret_cast<nvtxDomainHandle_t>(new std::string(name));
}

nvtxStringHandle_t NVTX_API keep(nvtxDomainHandle_t, const char* string) {
    return reinterpret_cast<nvtxStringHandle_t>(new std::string(string));
}

int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
    const bool kept = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
    std::fprintf(seen, "+%s:%s\n", text(domain), kept ? text(event->message.registered) : event->message.ascii);
    return std::fflush(seen);
}

int NVTX_API pop(nvtxDomainHandle_t domain) {
    std::fprintf(seen, "-%s\n", text(domain));
    return std::fflush(seen);
}

template <class Function>
void listen(NvtxFunctionTable table, NvtxCallbackIdCore2 id, Function* function) {
    *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
    const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get(NVTX_ETID_CALLBACKS));
    NvtxFunctionTable table = nullptr;
    unsigned int size = 0;
    if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    seen = std::fopen(std::getenv("NVTX_SEEN"), "w");
    listen(table, NVTX_CBID_CORE2_DomainCreateA, create);
    listen(table, NVTX_CBID_CORE2_DomainRegisterStringA, keep);
    listen(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
    listen(table, NVTX_CBID_CORE2_DomainRangePop, pop);
    return seen != nullptr;
}
