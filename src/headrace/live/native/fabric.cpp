// One end of a libfabric data path: an endpoint with registered memory, writes whose note arrives as remote completion
// data, and a queue to look at. The library is opened when the first endpoint is made, so this builds from its headers
// alone and loads without it. Nothing here is thread-safe: one thread drives an endpoint.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace nb = nanobind;

namespace headrace {
namespace {

constexpr size_t kFlyingMax = 128;  // operations at once: as many as every provider's queues hold
constexpr size_t kQueueSize = 4096;

// What is not an inline function of the headers.
struct Library {
  decltype(&fi_getinfo) getinfo;
  decltype(&fi_freeinfo) freeinfo;
  decltype(&fi_dupinfo) dupinfo;
  decltype(&fi_fabric) fabric;
  decltype(&fi_strerror) strerror;

  Library() {
    void* handle = dlopen("libfabric.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error(dlerror());
    load(handle, "fi_getinfo", getinfo);
    load(handle, "fi_freeinfo", freeinfo);
    load(handle, "fi_dupinfo", dupinfo);
    load(handle, "fi_fabric", fabric);
    load(handle, "fi_strerror", strerror);
  }

  template <class F>
  static void load(void* handle, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    if (!function) throw std::runtime_error(std::string("libfabric has no ") + name);
  }
};

const Library& library() {
  static const Library loaded;
  return loaded;
}

void check(const char* what, long code) {
  if (code < 0) throw std::runtime_error(std::string(what) + ": " + library().strerror(static_cast<int>(-code)));
}

struct Close {
  template <class T>
  void operator()(T* object) const {
    fi_close(&object->fid);
  }
};
template <class T>
using Owned = std::unique_ptr<T, Close>;

struct Job;

// The provider may keep its own notes in `context` while the operation is under way.
struct Operation {
  fi_context2 context;
  Job* job;
};

struct Piece {
  const char* source;
  uint64_t target;
  size_t nbytes;
};

struct Job {
  uint64_t id;
  uint64_t note;
  void* descriptor;
  uint64_t key;
  std::vector<Piece> pieces;
  size_t next = 0;
  size_t flying = 0;
};

struct Memory {
  Owned<fid_mr> region;
  uint64_t address;
};

class Endpoint {
 public:
  Endpoint(const std::string& provider, const std::string& host) {
    open(provider, host);
    fi_av_attr av{};
    av.type = info_->domain_attr->av_type;
    fid_av* av_raw = nullptr;
    check("fi_av_open", fi_av_open(domain_.get(), &av, &av_raw, nullptr));
    av_.reset(av_raw);
    fi_cq_attr cq{};
    cq.size = kQueueSize;
    cq.format = FI_CQ_FORMAT_DATA;
    cq.wait_obj = FI_WAIT_NONE;
    fid_cq* cq_raw = nullptr;
    check("fi_cq_open", fi_cq_open(domain_.get(), &cq, &cq_raw, nullptr));
    cq_.reset(cq_raw);
    fid_ep* ep_raw = nullptr;
    check("fi_endpoint", fi_endpoint(domain_.get(), info_.get(), &ep_raw, nullptr));
    ep_.reset(ep_raw);
    check("fi_ep_bind", fi_ep_bind(ep_.get(), &av_->fid, 0));
    check("fi_ep_bind", fi_ep_bind(ep_.get(), &cq_->fid, FI_TRANSMIT | FI_RECV));
    check("fi_enable", fi_enable(ep_.get()));
  }

  ~Endpoint() { close(); }

  nb::bytes name() {
    char buffer[512];
    size_t size = sizeof(buffer);
    check("fi_getname", fi_getname(&need().fid, buffer, &size));
    return nb::bytes(buffer, size);
  }

  void connect(const nb::bytes& name) {
    need();
    int inserted = fi_av_insert(av_.get(), name.c_str(), 1, &peer_, 0, nullptr);
    if (inserted != 1) throw std::runtime_error("fi_av_insert: this address cannot be used");
  }

  // (address, key) by which a peer reaches it.
  std::pair<uint64_t, uint64_t> enroll(uint64_t number, uintptr_t address, size_t nbytes) {
    need();
    fid_mr* raw = nullptr;
    void* memory = reinterpret_cast<void*>(address);
    check("fi_mr_reg", fi_mr_reg(domain_.get(), memory, nbytes, FI_WRITE | FI_REMOTE_WRITE, 0, number, 0, &raw, nullptr));
    Owned<fid_mr> region(raw);
    int mode = info_->domain_attr->mr_mode;
    if (mode & FI_MR_ENDPOINT) {
      check("fi_mr_bind", fi_mr_bind(raw, &ep_->fid, 0));
      check("fi_mr_enable", fi_mr_enable(raw));
    }
    memory_[number] = Memory{std::move(region), address};
    return {mode & FI_MR_VIRT_ADDR ? address : 0, fi_mr_key(raw)};
  }

  void dismiss(uint64_t number) { memory_.erase(number); }

  // Pieces: int64 rows of (source offset, target offset, nbytes), none of 0 bytes, at least one.
  void write(uint64_t id, uint64_t number, uintptr_t pieces, size_t count, uint64_t target, uint64_t key, uint64_t note) {
    need();
    const Memory& memory = memory_.at(number);
    Job job{id, note, fi_mr_desc(memory.region.get()), key, {}};
    const int64_t* row = reinterpret_cast<const int64_t*>(pieces);
    size_t most = info_->ep_attr->max_msg_size;
    for (size_t i = 0; i < count; i++, row += 3) {
      for (size_t at = 0, nbytes = row[2]; at < nbytes;) {
        size_t size = std::min(most, nbytes - at);
        const char* source = reinterpret_cast<const char*>(memory.address) + row[0] + at;
        job.pieces.push_back({source, target + row[1] + at, size});
        at += size;
      }
    }
    jobs_.push_back(std::move(job));
    issue();
  }

  // (ids of writes that are done, notes that have come).
  std::pair<std::vector<uint64_t>, std::vector<uint64_t>> poll() {
    need();
    std::vector<uint64_t> done, notes;
    {
      nb::gil_scoped_release release;
      look(done, notes);
      issue();
    }
    return {std::move(done), std::move(notes)};
  }

  void close() {
    ep_.reset();
    memory_.clear();
    cq_.reset();
    av_.reset();
    domain_.reset();
    fabric_.reset();
    jobs_.clear();
    operations_.clear();
  }

 private:
  struct FreeInfo {
    void operator()(fi_info* info) const { library().freeinfo(info); }
  };
  using Info = std::unique_ptr<fi_info, FreeInfo>;

  void open(const std::string& provider, const std::string& host) {
    Info hints(library().dupinfo(nullptr));
    hints->caps = FI_MSG | FI_RMA | FI_WRITE | FI_REMOTE_WRITE;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->cq_data_size = sizeof(uint64_t);
    hints->domain_attr->mr_mode =
        FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints->fabric_attr->prov_name = strdup(provider.c_str());
    fi_info* found = nullptr;
    const char* node = host.empty() ? nullptr : host.c_str();
    uint64_t flags = node ? FI_SOURCE : 0;
    check("fi_getinfo", library().getinfo(FI_VERSION(1, 17), node, nullptr, flags, hints.get(), &found));
    info_.reset(found);
    fid_fabric* fabric = nullptr;
    check("fi_fabric", library().fabric(info_->fabric_attr, &fabric, nullptr));
    fabric_.reset(fabric);
    fid_domain* domain = nullptr;
    check("fi_domain", fi_domain(fabric_.get(), info_.get(), &domain, nullptr));
    domain_.reset(domain);
  }

  fid_ep& need() const {
    if (!ep_) throw std::runtime_error("the endpoint is closed");
    return *ep_;
  }

  // Delivery is in no order, so the last piece, which bears the note, leaves when all others have arrived.
  void issue() {
    for (Job& job : jobs_) {
      while (job.next < job.pieces.size() && operations_.size() < kFlyingMax) {
        bool last = job.next + 1 == job.pieces.size();
        if (last && job.flying) break;
        if (!start(job, last)) return;
      }
    }
  }

  bool start(Job& job, bool last) {
    const Piece& piece = job.pieces[job.next];
    operations_.push_back({});
    auto operation = std::prev(operations_.end());
    operation->job = &job;
    iovec local{const_cast<char*>(piece.source), piece.nbytes};
    fi_rma_iov remote{piece.target, piece.nbytes, job.key};
    fi_msg_rma message{&local, &job.descriptor, 1, peer_, &remote, 1, &operation->context, job.note};
    uint64_t flags = FI_COMPLETION | FI_DELIVERY_COMPLETE | (last ? FI_REMOTE_CQ_DATA : 0);
    ssize_t code = fi_writemsg(ep_.get(), &message, flags);
    if (code) {
      operations_.erase(operation);
      if (code == -FI_EAGAIN) return false;
      check("fi_writemsg", code);
    }
    job.next++;
    job.flying++;
    return true;
  }

  void look(std::vector<uint64_t>& done, std::vector<uint64_t>& notes) {
    fi_cq_data_entry entries[64];
    for (;;) {
      ssize_t count = fi_cq_read(cq_.get(), entries, 64);
      if (count == -FI_EAGAIN) return;
      if (count == -FI_EAVAIL) {
        fi_cq_err_entry error{};
        check("fi_cq_readerr", fi_cq_readerr(cq_.get(), &error, 0));
        check("a write", -static_cast<long>(error.err));
      }
      check("fi_cq_read", count);
      for (ssize_t i = 0; i < count; i++) {
        if (entries[i].flags & FI_REMOTE_CQ_DATA) {
          notes.push_back(entries[i].data);
        } else if (entries[i].op_context) {
          finish(entries[i].op_context, done);
        }
      }
      if (count < 64) return;
    }
  }

  void finish(void* context, std::vector<uint64_t>& done) {
    auto same = [context](const Operation& o) { return &o.context == context; };
    auto operation = std::find_if(operations_.begin(), operations_.end(), same);
    if (operation == operations_.end()) return;
    Job* job = operation->job;
    operations_.erase(operation);
    if (--job->flying || job->next < job->pieces.size()) return;
    done.push_back(job->id);
    jobs_.remove_if([job](const Job& j) { return &j == job; });
  }

  Info info_;
  Owned<fid_fabric> fabric_;
  Owned<fid_domain> domain_;
  Owned<fid_av> av_;
  Owned<fid_cq> cq_;
  Owned<fid_ep> ep_;
  std::unordered_map<uint64_t, Memory> memory_;
  std::list<Job> jobs_;
  std::list<Operation> operations_;
  fi_addr_t peer_ = FI_ADDR_UNSPEC;
};

}  // namespace
}  // namespace headrace

NB_MODULE(_fabric, m) {
  using headrace::Endpoint;
  nb::class_<Endpoint>(m, "Endpoint")
      .def(nb::init<const std::string&, const std::string&>())
      .def("name", &Endpoint::name)
      .def("connect", &Endpoint::connect)
      .def("enroll", &Endpoint::enroll)
      .def("dismiss", &Endpoint::dismiss)
      .def("write", &Endpoint::write)
      .def("poll", &Endpoint::poll)
      .def("close", &Endpoint::close);
}
